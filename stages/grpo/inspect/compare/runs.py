"""compare.runs: two runs -> where they part, what differs in configuration, their curves and last numbers."""

import json
from collections.abc import Sequence
from typing import Any

from grpo import sql
from grpo.artifacts import STAGE_OUTPUTS, ActiveRun, Run, created_config, tell_apart
from grpo.artifacts.layout import parse_iterations
from grpo.config import Config, differing_keys
from grpo.errors import UsageError
from grpo.inspect import outdated
from grpo.inspect.compare import measures
from grpo.inspect.show.choice import EVERY, range_text, sampled

LAST = 5  # iterations whose groups make the last numbers: one alone has few
ORDER = (
    *("reward", "rewards", "pass_rate", "eval_pass_at_1", "eval_reward", "kl", "entropy", "response_tokens"),
    *("truncated", "groups_without_signal", "rollouts_spent", "tokens_spent", "seconds"),
)
_MEASURED = ("rollouts", "rewards", "advantages")  # outputs that the last numbers are of
KEY_OF = {"prompts": "prompts.source", "policy@0": "model", "reference": "update.reference"}


def describe(a: ActiveRun, b: ActiveRun, wanted: str) -> dict[str, Any]:
    """Everything `grpo compare A B` shows of two runs, as plain data; b - a in every difference.

    `wanted`: 3, 0-19 or all iterations. Raises UsageError (exit 2) where none is shared.
    """
    common, chosen = shared([a, b], wanted)
    outdated.say([a, b], chosen)
    first, last = parse_iterations(wanted) or (0, EVERY)
    parted = {output: _first_difference(a, b, output) for output in STAGE_OUTPUTS}
    firsts = {output: found["iteration"] for output, found in parted.items() if found}
    begun = min(firsts.values(), default=EVERY)
    # What comes before is the same row by row: a difference of 0 that says nothing of how the runs differ.
    begin = min((firsts[output] for output in _MEASURED if output in firsts), default=EVERY)
    own = [number for number in chosen if number >= begin][-LAST:]
    return {
        "compared": "runs",
        "a": a.name,
        "b": b.name,
        "common_iterations": common,
        "parted": parted,
        "shared_iterations": sum(number < begun for number in common),
        "configuration": _configuration(a, b),
        "curves": _read(a, b, "curves", first=first, last=last),
        "last": _last(a, b, own[0], own[-1]) if own else None,
        "passing": measures.passing([a, b], chosen[-1]),
        "measured_otherwise": measures.differing([a, b], chosen[-1]),
    }


def shared(runs: Sequence[Run], wanted: str) -> tuple[list[int], list[int]]:
    """Iterations of which all have rollouts, and those of them that are `wanted`: 3, 0-19 or all.

    Tells runs of one name apart. Raises UsageError (exit 2) where there is none, or a run is there twice.
    """
    paths = [run.path.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise UsageError(f"{' '.join(str(run.path) for run in runs)}: cannot compare a run with itself")
    tell_apart(runs)
    have = {run.name: sampled(run) for run in runs}
    common = sorted(set.intersection(*map(set, have.values())))
    first, last = parse_iterations(wanted) or (0, EVERY)
    chosen = [number for number in common if first <= number <= last]
    if not chosen or (last != EVERY and not {first, last} <= {*chosen}):
        ranges = ", ".join(f"{name} of {range_text(numbers)}" for name, numbers in have.items())
        none = "have no iteration" if wanted == "all" else f"do not have all of --iteration {wanted}"
        raise UsageError(f"{' '.join(have)}: {none} in common; rollouts: {ranges}")
    return common, chosen


def _first_difference(a: Run, b: Run, output: str) -> dict[str, Any] | None:
    """The first iteration in which the ids of what an output holds differ, and which; null for none."""
    for iteration in sorted({*a.iterations(), *b.iterations()}):
        one, other = (run.manifest(output, iteration) for run in (a, b))
        if one is None or other is None:
            return None  # one goes on where the other has ended: until there they are the same
        what = sorted(n for n in {*one.ids, *other.ids} if one.ids.get(n) != other.ids.get(n))
        if what:
            return {"iteration": iteration, "what": what}
    return None


def _configuration(a: Run, b: Run) -> list[str]:
    """What differs: keys of run.json, and the content of what has the same name."""
    created = [created_config(run.path) for run in (a, b)]
    before, after = (each.model_dump(exclude={"run": True, "score": {"rewards": True}}) for each in created)
    texts = [*differing_keys(before, after), *_rewards(*created)]
    for reference, key in KEY_OF.items():
        ids = {run.id_of(reference) for run in (a, b)}
        if len(ids - {None}) > 1:
            texts.append(f"{key}: its content differs")
    return texts


def _rewards(a: Config, b: Config) -> list[str]:
    """What differs between rewards of the same name, and the rewards that only one of the two has."""
    mine, theirs = ({each.name: each for each in config.score.rewards} for config in (a, b))
    texts = []
    for name, reward in {**mine, **theirs}.items():
        place = f"score.rewards.{name}"
        if name in mine and name in theirs:
            texts += differing_keys(mine[name].model_dump(), theirs[name].model_dump(), f"{place}.")
        else:
            given = reward.model_dump(exclude={"name"}, exclude_defaults=True)
            values = ", ".join(f"{key}: {json.dumps(value)}" for key, value in given.items())
            texts.append(f"{place}: {'removed' if name in mine else 'added'} ({values})")
    return texts


def _last(a: ActiveRun, b: ActiveRun, first: int, last: int) -> dict[str, Any]:
    """The means over iterations that are not the same in both, and how far they are apart."""
    same = a.id_of("prompts") == b.id_of("prompts")
    numbers = _read(a, b, "last_numbers", first=first, last=last, same_prompts=same)
    return {"first": first, "last": last, "numbers": numbers}


def _read(a: ActiveRun, b: ActiveRun, name: str, **values: Any) -> list[dict[str, Any]]:
    """Rows of a query of this folder: rewards first, by part; then what training did; what it cost last."""
    text, names = sql.own_text(f"inspect/compare/{name}"), {"a": a.name, "b": b.name}
    rows: list[dict[str, Any]] = sql.read([a, b], text, names | values).to_pylist(maps_as_pydicts="strict")
    return sorted(rows, key=lambda row: (ORDER.index(row["name"].partition(".")[0]), row["name"]))
