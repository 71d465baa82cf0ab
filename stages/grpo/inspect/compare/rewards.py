"""compare.rewards: two rewards over the same rollouts -> how far they agree on which of them are better."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from grpo import sql
from grpo.artifacts import ActiveRun, Run
from grpo.artifacts.layout import parse_iterations
from grpo.errors import InputError, UsageError
from grpo.inspect.compare.rank import kendall, spearman
from grpo.inspect.compare.subjects import SUM


def describe(run: ActiveRun, a: str, b: str, wanted: str, num_examples: int) -> dict[str, Any]:
    """Everything `grpo compare A B` shows of two rewards, as plain data.

    `wanted`: 3, 0-19 or all iterations. Raises InputError (exit 4) when no rollout has both rewards.
    """
    first, last = chosen_iterations(run, wanted)
    names = {"a": a, "b": b}
    found = sql.read([run], sql.own_text("inspect/compare/paired"), {**names, "first": first, "last": last})
    both = found.drop_null()
    if not len(both):
        raise InputError(_nothing_to_compare(run, a, b, wanted, found))
    groups, totals = measured(run, both, run.config.advantage.epsilon)
    rows = [{**row, **_overall(both, row["iteration"])} for row in totals.to_pylist()]
    if not rows:
        raise InputError(f"{a} {b}: no group of run {run.name} has two rollouts with both rewards")
    return {
        "run": run.name,
        **names,
        "rollouts": {"compared": len(both), "without_both": len(found) - len(both)},
        "overall": rows[-1],
        "iterations": rows[:-1],
        "examples": _examples(run, both, groups, num_examples),
    }


def chosen_iterations(run: Run, wanted: str) -> tuple[int, int]:
    """First and last iteration of `wanted`. Raises UsageError (exit 2) where the run has none of them."""
    have = [number for number in run.iterations() if run.manifest("rollouts", number)]
    if not have:
        raise UsageError(f"run {run.name}: holds no rollouts yet")
    first, last = parse_iterations(wanted) or (have[0], have[-1])
    if not any(first <= number <= last for number in have):
        raise UsageError(f"--iteration {wanted}: run {run.name} has rollouts of {have[0]} to {have[-1]}")
    return first, last


def measured(run: ActiveRun, both: pa.Table, epsilon: float) -> tuple[pa.Table, pa.Table]:
    """The rows of groups.sql and totals.sql over `both`, rows of paired.sql without null."""
    with sql.connect([run], outputs=()) as connection:
        sql.register(connection, "paired", both)
        groups = sql.query(connection, sql.own_text("inspect/compare/groups"), {"epsilon": epsilon})
        sql.register(connection, "groups", groups)
        return groups, sql.query(connection, sql.own_text("inspect/compare/totals"))


def _overall(both: pa.Table, iteration: int | None) -> dict[str, float | None]:
    """Rank correlations over all rollouts of an iteration, or of all iterations, whatever their groups."""
    if iteration is not None:
        both = both.filter(pc.equal(both["iteration"], iteration))
    a, b = both["a"].to_numpy(), both["b"].to_numpy()
    return {"spearman": spearman(a, b), "kendall": kendall(a, b)}


def _examples(run: ActiveRun, both: pa.Table, groups: pa.Table, count: int) -> list[dict[str, Any]]:
    """The groups where they disagree most, one of a prompt.

    By the share of flipped pairs, then by how advantages change.
    """
    share = pc.divide(pc.cast(groups["flipped"], pa.float64()), pc.cast(groups["pairs"], pa.float64()))
    keys = [("share", "descending"), ("advantage_difference", "descending")]
    order = pc.sort_indices(
        groups.append_column("share", share),
        sort_keys=[*keys, ("iteration", "ascending"), ("group_id", "ascending")],
    )
    chosen: dict[int, dict[str, Any]] = {}
    for index in order:
        [row] = groups.slice(index.as_py(), 1).to_pylist()
        if len(chosen) == count or not row["advantage_difference"]:
            break
        chosen.setdefault(row["prompt_id"], row)
    return [_example(run, both, row) for row in chosen.values()]


def _example(run: ActiveRun, both: pa.Table, group: dict[str, Any]) -> dict[str, Any]:
    """One group: its prompt, and its responses with both values, the best by A first."""
    key = {name: group[name] for name in ("iteration", "group_id")}
    texts = sql.read(
        [run], sql.own_text("inspect/compare/texts"), {"group_id": key["group_id"]}, key["iteration"]
    ).to_pylist()
    same = pc.and_(*(pc.equal(both[name], value) for name, value in key.items()))
    responses = {row["sample_id"]: row["response"] for row in texts}
    members = [
        {"sample_id": row["sample_id"], "response": responses[row["sample_id"]], "a": row["a"], "b": row["b"]}
        for row in both.filter(same).to_pylist()
    ]
    members.sort(key=lambda row: (-row["a"], -row["b"], row["sample_id"]))
    counts = {name: group[name] for name in ("pairs", "flipped")}
    return {**key, **counts, "prompt": texts[0]["prompt"], "samples": members}


def _nothing_to_compare(run: Run, a: str, b: str, wanted: str, found: pa.Table) -> str:
    where = "" if wanted == "all" else f" of iteration {wanted}"
    without = [name for name, column in ((a, "a"), (b, "b")) if found[column].null_count == len(found)]
    lacking = without[0] if without else f"both {a} and {b}"
    way = (
        "`grpo advantage` computes the weighted sum"
        if without == [SUM]
        else "give the reward weight 0 in score.rewards, and `grpo score --iteration N --force` scores old"
        " rollouts"
    )
    return f"run {run.name}: no rollout{where} has a value of {lacking}; {way}"
