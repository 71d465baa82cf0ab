"""outdated: what stands beside newer rows that it was not made of, as advantages after a rescore, is said."""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from grpo.artifacts import ARTIFACTS, OUTPUTS, TABLES_OF, ActiveRun, Run, read_json, unscored_rounds
from grpo.artifacts.manifest import MANIFEST
from grpo.console import iterations_text
from grpo.errors import GrpoError

ALL = tuple(OUTPUTS)
# Output -> what it shows, what that must be as new as, and what it is where it is older; the first is said.
_SAYS = {
    "rewards": ("rewards", "rollouts", "they are of other responses"),
    "advantages": ("advantages", "rewards", "`reward` is the old sum"),
    "update": ("log-probs of the learner", "rollouts", "they are of other responses"),
}
_VIEWS = ("samples", "iterations")


def read_by(query: str) -> Collection[str]:
    """Outputs whose rows a query may read: those that it names, or all where it names a view over them."""
    words = {word.lower() for word in re.findall(r"\w+", query)}
    if words & {*_VIEWS}:
        return ALL
    return [output for output in ALL if words & {output, *TABLES_OF.get(output, ())}]


def say(
    runs: Sequence[ActiveRun], iterations: Iterable[int] | None = None, outputs: Collection[str] = ALL
) -> None:
    """One line on stderr for each output of a run that is older than what it was made of.

    iterations: those that are looked at; None: all of each run.
    """
    wanted = [output for output in _SAYS if output in outputs]
    for run in runs if wanted else ():
        found: dict[str, list[int]] = {}
        for number in run.iterations() if iterations is None else iterations:
            held = {name: _held(run, name, number) for name in ("rollouts", "rewards", *wanted)}
            if output := next((each for each in wanted if _is_older(run, held, each, number)), None):
                found.setdefault(output, []).append(number)
        for output, numbers in found.items():
            run.console.say(_line(run, output, numbers))


def _held(run: Run, output: str, iteration: int) -> dict[str, Any]:
    """The manifest of an output, {} without one. Unchecked, which takes a tenth of the time: a query over
    a thousand iterations waits for this. Whoever reads the rows of one that is damaged says so.
    """
    try:
        return read_json(run.folder(output, iteration) / MANIFEST, ids=dict, inputs=dict, summary=dict)
    except (GrpoError, FileNotFoundError, NotADirectoryError):
        return {}


def _is_older(run: Run, held: dict[str, dict[str, Any]], output: str, iteration: int) -> bool:
    """Whether anything of its own iteration that an output read, or would read, is another now."""
    made, at = held[output], f"@{iteration}"
    if not made:
        return False
    sources = [held[name] for name in ("rollouts", "rewards") if held[name]]
    present = {f"{name}{at}": id_ for source in sources for name, id_ in source["ids"].items()}
    kinds = ("rollouts@", "reward/") if output == "advantages" else ("rollouts@",)
    read = {name: id_ for name, id_ in made["inputs"].items() if name.startswith(kinds) and name.endswith(at)}
    weights = held["rewards"]["summary"].get("weights") if output == "advantages" and held["rewards"] else {}
    needed = (
        {f"reward/{name}{at}" for name in weights if weights[name]} if isinstance(weights, dict) else set()
    )
    changed = any(present.get(name, id_) != id_ for name, id_ in read.items())
    return (changed or not needed <= read.keys()) and not (output == "rewards" and _has_grown(run, iteration))


def _has_grown(run: Run, iteration: int) -> bool:
    """Whether rollouts are those that were scored and another round, which is not yet."""
    rewards = run.manifest("rewards", iteration)
    return rewards is not None and bool(unscored_rounds(run, rewards))


def _line(run: Run, output: str, numbers: list[int]) -> str:
    what, than, shows = _SAYS[output]
    many = f"{len(numbers)} of " if len(numbers) <= numbers[-1] - numbers[0] else ""
    name = run.name if run.root == ARTIFACTS else run.path
    where = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else numbers[0]
    way = f"`grpo {OUTPUTS[output]} {name} --iteration {where} --force` reruns them"
    where_older = f"{what} of {many}{iterations_text(numbers)} are older than their {than}"
    return f"run {run.name}: {where_older}: {shows}; {way}"
