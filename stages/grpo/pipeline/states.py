"""states: what is done, partial, stale, changed or missing, and why; read from manifests alone."""

from collections.abc import Collection
from dataclasses import dataclass

from grpo.artifacts import (
    ActiveRun,
    Manifest,
    Plan,
    Run,
    can_be_had,
    holder_of,
    lacking,
    staged_attempts,
    unscored_rounds,
)
from grpo.errors import InputError, UsageError
from grpo.pipeline.stages import EVALUATE, SCORE, STAGES, Stage


@dataclass(frozen=True)
class State:
    """Of one stage in one iteration: done, partial, stale, changed or missing; and why."""

    name: str
    why: str = ""


def states(run: ActiveRun, until: int | None = None) -> dict[int, dict[str, State]]:
    """State of every stage of every iteration on disk (up to `until`), by iteration and stage name."""
    stale: set[tuple[str, int | None]] = set()
    found: dict[int, dict[str, State]] = {}
    with run.steady():
        for iteration in run.iterations():
            if until is not None and iteration > until:
                break
            found[iteration] = {stage.name: state_of(run, stage, iteration, stale) for stage in STAGES}
    return found


def state_of(run: ActiveRun, stage: Stage, iteration: int, stale: set[tuple[str, int | None]]) -> State:
    """State of one output; what is stale is added to `stale`, since what reads it is stale too."""
    manifest = run.manifest(stage.output, iteration)
    if manifest is None:
        return State("missing")
    reason = _input_stale(run, stage, manifest, stale)
    changes: list[str] = []
    if not reason:
        try:
            reason, changes = _compared(stage.plan(run, iteration), manifest)
        except InputError as error:
            reason = str(error)
        except UsageError as error:  # the user's function or SQL is gone
            changes = [str(error)]
    if reason:
        stale.add((stage.output, iteration))
        return State("stale", reason)
    if lacks := lacking(run, manifest):
        return State("partial", lacks)
    return State("changed", "; ".join(changes)) if changes else State("done")


def _input_stale(run: Run, stage: Stage, manifest: Manifest, stale: set[tuple[str, int | None]]) -> str:
    """Why what an output read is not what it was; empty: it is."""
    for reference, recorded in manifest.inputs.items():
        present = run.id_of(reference)
        if present is None:
            return f"{reference} is gone"
        grown = present != recorded and stage.output == SCORE.output and unscored_rounds(run, manifest)
        if present != recorded and not grown:
            return f"{reference} changed"
        if holder_of(reference) in stale:
            return f"{reference} is stale"
    return ""


def _compared(plan: Plan, manifest: Manifest) -> tuple[str, list[str]]:
    """Why an output is stale now though nothing that it read changed; and what changed otherwise."""
    if plan.same_as(manifest):
        return "", []
    changes = plan.differences(manifest)
    added = [reference for reference in plan.inputs if reference not in manifest.inputs]
    if added and not changes:
        return f"{added[0]} is new", []
    return "", changes or ["its shard plan"]


def evaluation_states(run: ActiveRun, present: dict[int, dict[str, State]]) -> dict[int, State]:
    """State of the evaluation of every policy that has one. present: as states() gives it."""
    stale: set[tuple[str, int | None]] = {
        (stage.output, iteration)
        for iteration, by_stage in present.items()
        for stage in STAGES
        if by_stage[stage.name].name == "stale"
    }
    with run.steady():
        return {policy: state_of(run, EVALUATE, policy, stale) for policy in run.evaluations()}


def differences_of(run: ActiveRun, stage: Stage, manifest: Manifest) -> list[str]:
    """What changed in configuration and code since `manifest` of `stage`."""
    assert manifest.iteration is not None
    try:
        plan = stage.plan(run, manifest.iteration)
    except UsageError as error:
        return [str(error)]
    return [] if plan.same_as(manifest) else plan.differences(manifest) or ["its shard plan"]


def inputs_changed(run: Run, manifest: Manifest) -> bool:
    """Whether anything an output read has another id now."""
    return any(run.id_of(reference) != recorded for reference, recorded in manifest.inputs.items())


def nearest_policy(run: Run, iteration: int) -> int:
    """The newest policy that can be had and is not after `iteration`: what `--from` can go on from."""
    made = [number + 1 for number in run.iterations() if number < iteration]
    return next((policy for policy in reversed(made) if can_be_had(run, policy)), 0)


def followers(run: Run, output: str, iterations: Collection[int]) -> list[str]:
    """Outputs on disk that read `output` of one of `iterations`, directly or not: `update@3`, in order."""
    reached: set[tuple[str, int | None]] = {(output, iteration) for iteration in iterations}
    texts = []
    for number in sorted(n for n in {*run.iterations(), *run.evaluations()} if n >= min(iterations)):
        for stage in (EVALUATE, *STAGES):
            manifest = run.manifest(stage.output, number)
            if manifest is None or (stage.output, number) in reached:
                continue
            holders = {holder_of(reference) for reference in manifest.inputs}
            if holders & reached:
                reached.add((stage.output, number))
                texts.append(f"{stage.output}@{number}")
    return texts


def unfinished(run: ActiveRun, stage: Stage, iteration: int) -> bool:
    """Whether an attempt at the output was begun and not committed."""
    try:
        return bool(staged_attempts(run, stage.plan(run, iteration)))
    except InputError:
        return False
