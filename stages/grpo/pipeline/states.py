"""staleness: what is done, partial, stale, changed or is missing, and why; read from manifests alone."""

from dataclasses import dataclass

from grpo.artifacts import Manifest, Run, holder_of, lacking, staged_attempts, unscored_rounds
from grpo.errors import InputError, UsageError
from grpo.pipeline.stages import EVALUATE, SCORE, STAGES, Stage


@dataclass(frozen=True)
class State:
    """Of one stage in one iteration: done, partial, stale, changed or missing; and why."""

    name: str
    why: str = ""


def states(run: Run, until: int | None = None) -> dict[int, dict[str, State]]:
    """State of every stage of every iteration on disk (up to `until`), by iteration and stage name."""
    stale: set[tuple[str, int | None]] = set()
    found: dict[int, dict[str, State]] = {}
    for iteration in run.iterations():
        if until is not None and iteration > until:
            break
        found[iteration] = {stage.name: state_of(run, stage, iteration, stale) for stage in STAGES}
    return found


def state_of(run: Run, stage: Stage, iteration: int, stale: set[tuple[str, int | None]]) -> State:
    """State of one output; what is stale is added to `stale`, since what reads it is stale too."""
    manifest = run.manifest(stage.output, iteration)
    if manifest is None:
        return State("missing")
    reason = _stale_because(run, stage, iteration, manifest, stale)
    if reason:
        stale.add((stage.output, iteration))
        return State("stale", reason)
    if lacks := lacking(run, manifest):
        return State("partial", lacks)
    changes = differences_of(run, stage, manifest)
    return State("changed", "; ".join(changes)) if changes else State("done")


def _stale_because(
    run: Run, stage: Stage, iteration: int, manifest: Manifest, stale: set[tuple[str, int | None]]
) -> str:
    for reference, recorded in manifest.inputs.items():
        present = run.id_of(reference)
        if present is None:
            return f"{reference} is gone"
        grown = stage.output == SCORE.output and unscored_rounds(run, manifest)
        if present != recorded and not grown:
            return f"{reference} changed"
        if holder_of(reference) in stale:
            return f"{reference} is stale"
    try:
        plan = stage.plan(run, iteration)
    except InputError as error:
        return str(error)
    except UsageError:
        return ""  # the user's function or SQL is gone: that differs
    added = [reference for reference in plan.inputs if reference not in manifest.inputs]
    return f"{added[0]} is new" if added and not plan.differences(manifest) else ""


def evaluation_states(run: Run, present: dict[int, dict[str, State]]) -> dict[int, State]:
    """State of the evaluation of every policy that has one. present: as states() gives it."""
    stale: set[tuple[str, int | None]] = {
        (stage.output, iteration)
        for iteration, by_stage in present.items()
        for stage in STAGES
        if by_stage[stage.name].name == "stale"
    }
    return {policy: state_of(run, EVALUATE, policy, stale) for policy in run.evaluations()}


def differences_of(run: Run, stage: Stage, manifest: Manifest) -> list[str]:
    """What changed in configuration and code since `manifest` of `stage`."""
    assert manifest.iteration is not None
    try:
        plan = stage.plan(run, manifest.iteration)
    except UsageError as error:
        return [str(error)]
    changes = plan.differences(manifest)
    return changes or ([] if plan.same_as(manifest) else ["its shard plan"])


def inputs_changed(run: Run, manifest: Manifest) -> bool:
    """Whether anything an output read has another id now."""
    return any(run.id_of(reference) != recorded for reference, recorded in manifest.inputs.items())


def followers(run: Run, output: str, iteration: int) -> list[str]:
    """Outputs on disk that read `output` of `iteration`, directly or not: `update@3`, in order."""
    reached: set[tuple[str, int | None]] = {(output, iteration)}
    texts = []
    for number in sorted(n for n in {*run.iterations(), *run.evaluations()} if n >= iteration):
        for stage in (EVALUATE, *STAGES):
            manifest = run.manifest(stage.output, number)
            if manifest is None or (stage.output, number) in reached:
                continue
            holders = {holder_of(reference) for reference in manifest.inputs}
            if holders & reached:
                reached.add((stage.output, number))
                texts.append(f"{stage.output}@{number}")
    return texts


def unfinished(run: Run, stage: Stage, iteration: int) -> bool:
    """Whether an attempt at the output was begun and not committed."""
    try:
        return bool(staged_attempts(run, stage.plan(run, iteration)))
    except InputError:
        return False
