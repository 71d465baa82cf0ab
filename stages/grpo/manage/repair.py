"""repair: what rebuilds a damaged output, or why nothing can."""

from dataclasses import dataclass
from pathlib import Path

from grpo.artifacts import EVALUATION, OUTPUTS, ActiveRun, Run, holder_of, is_kept, read_manifest
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

_TABLES = ("rollouts", "rewards", "advantages")  # of earlier iterations, for generate.prompts_sql
_REPLAYED = ("rollouts", "advantages")  # likewise, for update.replay_iterations


@dataclass(frozen=True)
class Damage:
    """Something that is not what was committed, or is gone though something else was made from it."""

    found: str
    redo: str
    """The command that rebuilds it once it is out of the way; "" where none can."""
    aside: Path | None = None
    """What has to be out of the way first."""


def damage(run: ActiveRun, place: Place, wrong: dict[Place, str]) -> Damage:
    """The damage at a place, and what to do. wrong: what was found there and at all other places."""
    output, iteration = place
    folder = run.folder(*place)
    if moved := _moved(folder, place):
        return Damage(f"{wrong[place]}; move it to {run.folder(*moved)}", "")
    if lost := _lost(run, place, wrong):
        way = "restore it from a copy"
        if not any(base[1] is None and base in wrong and _lost(run, base, wrong) for base in wrong):
            nearest = max(number for number in _usable(run, wrong) if number <= (iteration or 0))
            way += f", or `grpo run --from {nearest}`"
        return Damage(f"{wrong[place]}; cannot be rebuilt ({lost}): {way}", "")
    redo = command_for(output, iteration)
    return Damage(wrong[place], redo, folder if folder.exists() or folder.is_symlink() else None)


def command_for(output: str, iteration: int | None) -> str:
    """The command that makes an output, or goes on with what is staged of it."""
    stage = OUTPUTS.get(output)
    if stage is None or iteration is None:
        return "grpo run"
    if output == EVALUATION:
        return f"grpo evaluate --policy {iteration}"
    return f"grpo {stage} --iteration {iteration}"


def read_by(run: ActiveRun, place: Place) -> list[Place]:
    """What an output is made from, with the configuration of `run`."""
    output, iteration = place
    if iteration is None:
        return []
    past: list[Place] = []
    if output == "rollouts" and run.config.generate.prompts_sql is not None:
        past = [(name, number) for number in range(iteration) for name in _TABLES]
    if output == "update":
        first = max(0, iteration - run.config.update.replay_iterations)
        past = [(name, number) for number in range(first, iteration) for name in _REPLAYED]
    return [*past, *(holder_of(f"{name}@{iteration}") for name in _READS[output])]


def _moved(folder: Path, place: Place) -> Place | None:
    """The place of an output that is whole and lies at another's."""
    try:
        manifest = read_manifest(folder)
    except (CorruptError, InputError):
        return None
    if manifest is None:
        return None
    outputs = {stage: output for output, stage in OUTPUTS.items()}
    own = (outputs.get(manifest.stage, manifest.stage), manifest.iteration)
    whole = all((folder / file.part / file.name).exists() for file in manifest.files)
    return own if own != place and whole else None


def _lost(
    run: ActiveRun, place: Place, wrong: dict[Place, str], known: dict[Place, str] | None = None
) -> str:
    """Why an output cannot be made again; empty where it can. known: what was found of others already."""
    known = {} if known is None else known
    if place not in known:
        known[place] = _reason_lost(run, place, wrong, known)
    return known[place]


def _reason_lost(run: ActiveRun, place: Place, wrong: dict[Place, str], known: dict[Place, str]) -> str:
    if place == ("prompts", None):
        return f"prompts.source: {run.config.prompts.source} is gone" if source_is_gone(run) else ""
    if place == (HELD_OUT, None):
        if run.config.evaluate is None:
            return "evaluate is not configured"
        source = config_of(run, HELD_OUT).source
        return f"evaluate.prompts.source: {source} is gone" if source_is_gone(run, HELD_OUT) else ""
    if place == ("policy", None):
        return _model_is_gone(run)
    have = [number for number in run.iterations() if run.has_checkpoint(number)]
    for read in read_by(run, place):
        output, iteration = read
        if output == "update" and iteration is not None:
            if read in wrong and not is_kept(run, iteration, have):
                return f"policy {iteration + 1} would be pruned as soon as it is made"
            if read not in wrong and run.is_pruned(iteration):
                return f"policy {iteration + 1} was pruned"
        if read in wrong and (reason := _lost(run, read, wrong, known)):
            return reason
    return ""


def _model_is_gone(run: ActiveRun) -> str:
    for name in (run.config.model, run.config.update.reference or run.config.model):
        try:
            resolve_model(run, name)
        except InputError as error:
            return str(error)
    return ""


def _usable(run: Run, wrong: dict[Place, str]) -> list[int]:
    """Policies that are there and whole."""
    return [number for number in run.policies() if number == 0 or ("update", number - 1) not in wrong]
