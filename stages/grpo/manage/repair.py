"""repair: what rebuilds a damaged output, or why nothing can."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from grpo.artifacts import (
    CHECKPOINT,
    EVALUATION,
    OUTPUTS,
    RUN_OUTPUTS,
    ActiveRun,
    Run,
    holder_of,
    origin_of,
    read_manifest,
)
from grpo.errors import CorruptError, InputError
from grpo.models.find import resolve_model
from grpo.prompts.table import HELD_OUT, config_of, source_is_gone

Place = tuple[str, int | None]
"""An output and its iteration; None: of the run as a whole."""

# The outputs that a stage reads; the names that its plan reads besides are held by these.
_READS = {
    "rollouts": ("policy", "prompts"),
    "rewards": ("rollouts",),
    "advantages": ("rollouts", "rewards"),
    "update": ("policy", "rollouts", "advantages"),
    EVALUATION: ("policy", HELD_OUT),
}


_REPLAYED = ("rollouts", "advantages", "update")


@dataclass(frozen=True)
class Damage:
    """Something that is not what was committed, or is gone though something else was made from it."""

    found: str
    redo: str
    """The command that rebuilds it once it is out of the way; "" where none can."""
    aside: Path | None = None
    """What has to be out of the way first."""


def damages(run: ActiveRun, wrong: dict[Place, str]) -> list[Damage]:
    """What is damaged and what to do, in the order of the outputs. wrong: what was found at each place."""
    lost: dict[Place, str] = {}
    order = [*RUN_OUTPUTS, *OUTPUTS, CHECKPOINT]  # what an output is made from comes before it
    for place in sorted(wrong, key=lambda place: (place[1] or 0, order.index(place[0]))):
        lost[place] = _reason_lost(run, place, wrong, lost)
    return [_damage(run, place, wrong, lost) for place in lost]


def _damage(run: Run, place: Place, wrong: dict[Place, str], lost: dict[Place, str]) -> Damage:
    folder, iteration = run.folder(*place), place[1] or 0
    if place[0] == CHECKPOINT and not lost[place]:
        what = f"{wrong[place]}; without it policy {iteration + 1} is rebuilt when it is needed"
        return Damage(what, "grpo run", folder)
    if moved := _moved(folder, place):
        return Damage(f"{wrong[place]}; move it to {run.folder(*moved)}", "")
    if not lost[place]:
        aside = folder if folder.exists() or folder.is_symlink() else None
        return Damage(wrong[place], command_for(*place), aside)
    way = "restore it from a copy"
    if not any(lost.get((output, None)) for output in RUN_OUTPUTS):
        way += f", or `grpo run --from {_nearest_whole(run, iteration, wrong)}`"
    return Damage(f"{wrong[place]}; cannot be rebuilt ({lost[place]}): {way}", "")


def _nearest_whole(run: Run, iteration: int, wrong: dict[Place, str]) -> int:
    """The newest policy up to `iteration` that can be had without what is wrong."""
    for policy in range(iteration, 0, -1):
        with suppress(CorruptError, InputError):
            origin = origin_of(run, policy, _damaged(wrong))
            needed = {("update", policy - 1)} | {
                (output, number) for number in range(origin.durable, policy) for output in _REPLAYED
            }
            if not needed & wrong.keys():
                return policy
    return 0


def command_for(output: str, iteration: int | None) -> str:
    """The command that makes an output, or goes on with what is staged of it."""
    stage = OUTPUTS.get(output)
    if stage is None or iteration is None:
        return "grpo run"
    return f"grpo {stage} --{'policy' if output == EVALUATION else 'iteration'} {iteration}"


def read_by(run: ActiveRun, place: Place) -> list[Place]:
    """What an output is made from, with the configuration of `run`."""
    output, iteration = place
    if iteration is None:
        return []
    if output == CHECKPOINT:
        return [("update", iteration)]
    earlier: tuple[str, ...] = ()
    first = 0
    if output == "rollouts" and run.config.generate.prompts_sql is not None:
        earlier = ("rollouts", "rewards", "advantages")
    if output == "update":
        earlier = ("rollouts", "advantages")
        first = max(0, iteration - run.config.update.replay_iterations)
    past: list[Place] = [(name, number) for number in range(first, iteration) for name in earlier]
    return [*past, *(holder_of(f"{name}@{iteration}") for name in _READS[output])]


def _damaged(wrong: dict[Place, str]) -> set[int]:
    """Policies whose checkpoint is not what was committed."""
    return {number + 1 for output, number in wrong if output == CHECKPOINT and number is not None}


def _moved(folder: Path, place: Place) -> Place | None:
    """The place of an output that is whole and lies at another's."""
    with suppress(CorruptError, InputError):
        if manifest := read_manifest(folder):
            made = [output for output, stage in OUTPUTS.items() if stage == manifest.stage]
            own = (made[0] if made else manifest.stage, manifest.iteration)
            whole = all((folder / file.part / file.name).exists() for file in manifest.files)
            return own if own != place and whole else None
    return None


def _reason_lost(run: ActiveRun, place: Place, wrong: dict[Place, str], lost: dict[Place, str]) -> str:
    """Why an output cannot be made again; empty where it can. lost: the same of those before it."""
    if place[1] is None:
        return _source_lost(run, place[0])
    for read in read_by(run, place):
        output, iteration = read
        if output == "update" and iteration is not None and read not in wrong:
            try:
                origin_of(run, iteration + 1, _damaged(wrong))
            except InputError as error:
                return str(error)
            except CorruptError:  # of what has to be rebuilt first
                pass
        if lost.get(read):
            return lost[read]
    return ""


def _source_lost(run: ActiveRun, output: str) -> str:
    """Why prompts, held-out prompts or the starting policy cannot be made again."""
    if output == "policy":
        try:
            resolve_model(run, run.config.model)
            resolve_model(run, run.config.update.reference or run.config.model)
        except InputError as error:
            return str(error)
        return ""
    if output == HELD_OUT and run.config.evaluate is None:
        return "evaluate is not configured"
    key = "evaluate.prompts.source" if output == HELD_OUT else "prompts.source"
    return f"{key}: {config_of(run, output).source} is gone" if source_is_gone(run, output) else ""
