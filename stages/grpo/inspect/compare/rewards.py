"""compare.rewards: two rewards over the same rollouts -> how far they agree on which of them are better."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from grpo import sql
from grpo.artifacts import ActiveRun, Run
from grpo.artifacts.layout import parse_iterations
from grpo.errors import InputError
from grpo.inspect import outdated
from grpo.inspect.compare import previous
from grpo.inspect.show.choice import EVERY, check_sampled

SUM = "reward"  # the weighted sum of the rewards, a column of `advantages`
_ALL_PAIRS = 64  # values of which it is fastest to look at every pair
Rows = list[dict[str, Any]]


def describe(run: ActiveRun, a: str, b: str, wanted: str, num_examples: int) -> dict[str, Any]:
    """Everything `grpo compare A B` shows of two rewards, as plain data.

    `wanted`: 3, 0-19 or all iterations. Raises InputError (exit 4) when no rollout has both rewards.
    """
    first, last = parse_iterations(wanted) or (0, EVERY)
    check_sampled(run, first, last, f"--iteration {wanted}")
    looked_at = [number for number in run.iterations() if first <= number <= last]
    outdated.say([run], looked_at, ("rewards", "advantages") if SUM in (a, b) else ("rewards",))
    names = {"a": a, "b": b}

    def compared(connection: sql.Connection) -> dict[str, Any]:
        if earlier := [name for name in (a, b) if name.endswith(previous.SUFFIX)]:
            sql.register(connection, "_rewards_0", previous.with_previous(run, earlier, first, last))
        found = _query(connection, "paired", **names, first=first, last=last)
        both = found.drop_null()
        if not len(both):
            raise InputError(_nothing_to_compare(run, a, b, wanted, found))
        rows = measured(connection, both, run.config.advantage.epsilon)
        if not rows:
            raise InputError(f"{a} {b}: no group of run {run.name} has two rollouts with both rewards")
        return {
            "compared": "rewards",
            "run": run.name,
            **names,
            "rollouts": {"compared": len(both), "without_both": len(found) - len(both)},
            "overall": rows[-1],
            "iterations": rows[:-1],
            "examples": _examples(connection, num_examples),
        }

    return sql.snapshot([run], compared)


def measured(connection: sql.Connection, both: pa.Table, epsilon: float) -> Rows:
    """Rows of totals.sql over `both`, rows of paired.sql without null, with correlations over all rollouts.

    Leaves `paired` and the rows of groups.sql, `groups`, in the connection.
    """
    sql.register(connection, "paired", both)
    sql.register(connection, "groups", _query(connection, "groups", epsilon=epsilon))
    overall = {row["iteration"]: row for row in _query(connection, "overall").to_pylist()}
    totals: Rows = _query(connection, "totals").to_pylist()
    for row in totals:
        of_row = overall[row["iteration"]]
        row |= {"spearman": of_row["spearman"], "kendall": _kendall(of_row)}
    return totals


def _kendall(row: dict[str, Any]) -> float | None:
    """Kendall's tau-b in [-1, 1] by Knight's method (JASA 61, 1966); null where a reward is constant."""
    if not row["scale"]:
        return None
    flipped = _inversions(np.array(row["b_by_a"]))  # within a tie of A they are in order: none is counted
    return float((row["untied"] - 2 * flipped) / row["scale"])


def _inversions(values: NDArray[Any]) -> int:
    """Number of i < j with values[i] > values[j]: within each half, and from the first half to the second."""
    if len(values) <= _ALL_PAIRS:
        return int(np.triu(values[:, None] > values).sum())
    first, second = np.array_split(values, 2)
    larger = len(first) - np.searchsorted(np.sort(first), second, side="right")
    return _inversions(first) + _inversions(second) + int(larger.sum())


def _query(connection: sql.Connection, name: str, **values: Any) -> pa.Table:
    return sql.query(connection, sql.own_text(f"inspect/compare/{name}"), values)


def _examples(connection: sql.Connection, count: int) -> Rows:
    """The groups where they disagree most: each its prompt, and its responses with both values."""
    examples: Rows = _query(connection, "examples", count=count).to_pylist()
    for example in examples:
        key = {name: example[name] for name in ("iteration", "group_id")}
        samples = _query(connection, "samples", **key).to_pylist()
        [prompt] = {row.pop("prompt") for row in samples}
        example |= {"prompt": prompt, "samples": samples}
    return examples


def _nothing_to_compare(run: Run, a: str, b: str, wanted: str, found: pa.Table) -> str:
    where = "" if wanted == "all" else f" of iteration {wanted}"
    without = [name for name, column in ((a, "a"), (b, "b")) if found[column].null_count == len(found)]
    lacking = without[0] if without else f"both {a} and {b}"
    force = "`grpo score --iteration N --force` scores old rollouts"
    way = f"give the reward weight 0 in score.rewards, and {force}"
    if without == [SUM]:
        way = "`grpo advantage` computes the weighted sum"
    return f"run {run.name}: no rollout{where} has a value of {lacking}; {way}"
