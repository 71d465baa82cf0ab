"""compare.runs: two runs -> where they part, what is configured otherwise, their curves and last numbers."""

import json
from collections.abc import Set
from typing import Any

from grpo import sql
from grpo.artifacts import STAGE_OUTPUTS, ActiveRun, Run, created_config
from grpo.artifacts.layout import parse_iterations
from grpo.config import Config, differing_keys
from grpo.errors import UsageError
from grpo.inspect.compare.difference import Group, difference

LAST = 5  # iterations whose groups make the last numbers: one alone has few
_ORDER = (
    *("reward", "rewards", "pass_rate", "eval_pass_at_1", "eval_reward", "kl", "entropy", "response_tokens"),
    *("truncated", "groups_without_signal", "rollouts_spent", "tokens_spent", "seconds"),
)
_EVERY = 2**31 - 1  # above any iteration
_MEASURED = ("rollouts", "rewards", "advantages")  # outputs that the last numbers are of
_OF_EVERY_GROUP = "response_tokens"  # a number that no group lacks
_PART_OF = {"prompts": "prompts.source", "policy": "model", "reference": "update.reference"}


def describe(a: ActiveRun, b: ActiveRun, wanted: str) -> dict[str, Any]:
    """Everything `grpo compare A B` shows of two runs, as plain data; b - a in every difference.

    `wanted`: 3, 0-19 or all iterations. Raises UsageError (exit 2) when they have no iteration of these in
    common.
    """
    have = {run.name: _sampled(run) for run in (a, b)}
    common = sorted({*have[a.name]} & {*have[b.name]})
    first, last = parse_iterations(wanted) or (0, _EVERY)
    chosen = [number for number in common if first <= number <= last]
    if not chosen:
        ranges = ", ".join(f"{name} of {_range(numbers)}" for name, numbers in have.items())
        none = "have no iteration" if wanted == "all" else f"have none of --iteration {wanted}"
        raise UsageError(f"{a.name} {b.name}: {none} in common; rollouts: {ranges}")
    parted = parted_at(a, b)
    return {
        "a": a.name,
        "b": b.name,
        "common_iterations": common,
        "parted": parted,
        "shared_iterations": _shared(parted, common),
        "configuration": _configuration(a, b),
        "curves": _curves(a, b, first, last),
        "last": _last(a, b, _own(parted, chosen)[-LAST:]),
    }


def parted_at(a: Run, b: Run) -> dict[str, dict[str, Any] | None]:
    """Of each output the first iteration in which the ids of what it holds differ, and which; else null."""
    return {output: _first_difference(a, b, output) for output in STAGE_OUTPUTS}


def _first_difference(a: Run, b: Run, output: str) -> dict[str, Any] | None:
    for iteration in sorted({*a.iterations(), *b.iterations()}):
        manifests = [run.manifest(output, iteration) for run in (a, b)]
        if None in manifests:
            return None  # one goes on where the other has ended: until there they are the same
        ids_a, ids_b = (manifest.ids for manifest in manifests if manifest is not None)
        if ids_a != ids_b:
            names = sorted({*ids_a, *ids_b})
            return {"iteration": iteration, "what": [n for n in names if ids_a.get(n) != ids_b.get(n)]}
    return None


def _shared(parted: dict[str, dict[str, Any] | None], common: list[int]) -> int:
    """Iterations from the first on of which every output is the same in both."""
    first = min((found["iteration"] for found in parted.values() if found), default=len(common))
    return sum(1 for number in common if number < first)


def _own(parted: dict[str, dict[str, Any] | None], chosen: list[int]) -> list[int]:
    """The iterations of `chosen` from the first on whose rollouts, rewards or advantages differ.

    What comes before is the same row by row: a difference of 0 that says nothing of how the runs differ.
    """
    begin = min((found["iteration"] for output in _MEASURED if (found := parted[output])), default=_EVERY)
    return [number for number in chosen if number >= begin]


def _configuration(a: Run, b: Run) -> list[str]:
    """What differs: keys of run.json, and the content of what has the same name."""
    created = [created_config(run.name, run.root) for run in (a, b)]
    before, after = (
        config.model_dump(exclude={"run": True, "score": {"rewards": True}}) for config in created
    )
    texts = [*differing_keys(before, after), *_rewards(*created)]
    for output in ("prompts", "policy"):
        ids = [
            manifest.ids if manifest else {} for manifest in (run.manifest(output, None) for run in (a, b))
        ]
        texts += [
            f"{_PART_OF[name]}: its content differs"
            for name in sorted(ids[0].keys() & ids[1].keys())
            if ids[0][name] != ids[1][name]
        ]
    return texts


def _rewards(a: Config, b: Config) -> list[str]:
    """What differs between rewards of the same name, and the rewards that only one of the two has."""
    mine, theirs = (
        {each.name: each.model_dump(exclude={"name"}) for each in config.score.rewards} for config in (a, b)
    )
    texts = []
    for name in dict.fromkeys([*mine, *theirs]):
        place = f"score.rewards.{name}"
        if name in mine and name in theirs:
            texts += differing_keys(mine[name], theirs[name], f"{place}.")
        else:
            [reward] = [each for config in (a, b) for each in config.score.rewards if each.name == name]
            given = reward.model_dump(exclude={"name"}, exclude_defaults=True)
            values = ", ".join(f"{key}: {json.dumps(value)}" for key, value in given.items())
            texts.append(f"{place}: {'removed' if name in mine else 'added'} ({values})")
    return texts


def _curves(a: ActiveRun, b: ActiveRun, first: int, last: int) -> list[dict[str, Any]]:
    """Each curve by iteration in both runs; a reward that one of them does not have is left out."""
    rows = sql.read([a, b], sql.own_text("inspect/compare/curves")).to_pylist()
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if first <= row["iteration"] <= last:
            of_run = found.setdefault(row["name"], {}).setdefault(row["run"], {})
            of_run[row["iteration"]] = row["value"]
    curves = []
    for name, by_run in found.items():
        if len(by_run) == 2:
            numbers = sorted({number for values in by_run.values() for number in values})
            points = [
                {"iteration": n, "a": by_run[a.name].get(n), "b": by_run[b.name].get(n)} for n in numbers
            ]
            curves.append({"name": name, "points": points})
    return sorted(curves, key=lambda curve: _place(curve["name"]))


def _last(a: ActiveRun, b: ActiveRun, chosen: list[int]) -> dict[str, Any] | None:
    """The means of the last iterations that are not the same in both, and how far they are apart."""
    if not chosen:
        return None
    rows = sql.read(
        [a, b], sql.own_text("inspect/compare/last_groups"), {"first": chosen[0], "last": chosen[-1]}
    ).to_pylist()
    same_prompts = a.id_of("prompts") == b.id_of("prompts")
    found: dict[str, dict[str, dict[Group, float]]] = {}
    for row in rows:
        of_run = found.setdefault(row["name"], {a.name: {}, b.name: {}})[row["run"]]
        of_run[row["iteration"], row["group_id"], row["prompt_id"]] = row["value"]
    drawn_a, drawn_b = (found[_OF_EVERY_GROUP][run.name].keys() for run in (a, b))
    numbers = []
    for name, by_run in found.items():
        both = {key[0] for key in by_run[a.name]} & {key[0] for key in by_run[b.name]}
        of_a, of_b = (
            {key: value for key, value in by_run[run.name].items() if key[0] in both} for run in (a, b)
        )
        if both:
            number = difference(of_a, of_b, same_prompts)
            left_out = _left_out(drawn_a, drawn_b, of_a, of_b) if number["paired"] else {}
            numbers.append({"name": name, **number, "left_out": left_out})
    numbers.sort(key=lambda number: _place(number["name"]))
    return {"first": chosen[0], "last": chosen[-1], "numbers": numbers}


def _left_out(
    drawn_a: Set[Group], drawn_b: Set[Group], of_a: dict[Group, float], of_b: dict[Group, float]
) -> dict[str, int]:
    """How many groups are no part of the pairs, by why; drawn: the groups that a run has."""
    in_both = drawn_a & drawn_b
    return {"without_value": len(in_both - (of_a.keys() & of_b.keys())), "in_one_run": len(drawn_a ^ drawn_b)}


def _place(name: str) -> tuple[int, str]:
    """Rewards first, by part; then what training did; what it cost last."""
    group = name.partition(".")[0]
    return (_ORDER.index(group) if group in _ORDER else len(_ORDER), name)


def _sampled(run: Run) -> list[int]:
    return [number for number in run.iterations() if run.manifest("rollouts", number)]


def _range(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
