"""fork: a run that begins as another one did, by hard links: nothing is copied, the other stays as it is.

Committed files are never written again, only replaced, so that two runs can share them.
"""

import os
from itertools import count, takewhile
from typing import Any

from grpo.artifacts import (
    EVALUATION,
    MANIFEST,
    PRUNED,
    RUN_OUTPUTS,
    STAGE_OUTPUTS,
    TIMINGS,
    ActiveRun,
    Run,
    created_config,
    files,
    lacking,
)
from grpo.errors import InputError, UsageError
from grpo.pipeline.prepare import run_json
from grpo.pipeline.stages import EVALUATE, STAGES
from grpo.pipeline.states import differences_of
from grpo.prompts.table import HELD_OUT


def fork(source: ActiveRun, new: ActiveRun, iteration: int | None) -> dict[str, Any]:
    """Make the run `new`, with a configuration of its own, from iterations of `source` before `iteration`.

    Of that iteration the outputs are taken over that `new` would make in the same way, up to the first that
    it would not. None: the iteration after those that `source` has completed; what is later is not looked at.
    Raises UsageError (exit 2) when `new` is there already or `source` has no such iteration, InputError (exit
    4) when the checkpoint to go on from was pruned.
    """
    _check_free(new)
    _check_fixed(source, new)
    done = takewhile(lambda n: n != iteration and source.manifest("update", n) is not None, count())
    completed = len(list(done))
    first = completed if iteration is None else iteration
    if first not in range(completed + 1):
        raise UsageError(f"--iteration {first}: run {source.name} has completed {completed} iterations")
    source.require_checkpoint(first)
    staged = ActiveRun(
        source.root, new.config.model_copy(update={"run": f".fork-{new.name}"}), new.imports, new.console
    )
    with staged.lock():  # two forks of one name: the other is exit 5
        _check_free(new)
        for leftover in staged.path.iterdir():  # of a fork that was killed
            if leftover.name != ".lock":
                files.remove_folder(leftover) if leftover.is_dir() else files.remove_file(leftover)
        taken = _link_all(source, staged, first)
        files.write_file(staged.path / "run.json", run_json(new.config))
        files.sync_folder(staged.path)
        files.move(staged.path, new.path)
        files.sync_folder(new.root)
    return {"iterations": first, "taken": taken}


def _link_all(source: ActiveRun, staged: ActiveRun, first: int) -> list[str]:
    """Link what comes before iteration `first`, and of it what can be taken over; returns those stages."""
    try:
        for output in RUN_OUTPUTS:
            if output != HELD_OUT or source.manifest(output, None) is not None:
                _link(source, staged, output, None)
        for number in range(first):
            for output in STAGE_OUTPUTS:
                _link(source, staged, output, number)
        taken = _take_over(source, staged, first)
        _link_evaluations(source, staged, first, STAGES[0].name in taken)
        return taken
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename}: gone while it was linked; `grpo verify {source.name}` says whether it is"
            " damaged, else try again"
        ) from None


def _link_evaluations(source: ActiveRun, staged: ActiveRun, first: int, sampled: bool) -> None:
    """Link what the shared policies were measured to be.

    Policy `first` only as the fork would measure it, unless it was sampled from and so is history too.
    """
    for policy in (number for number in source.evaluations() if number <= first):
        manifest = source.manifest(EVALUATION, policy)
        if manifest is None or lacking(source, manifest):
            continue
        if policy < first or sampled or not differences_of(staged, EVALUATE, manifest):
            _link(source, staged, EVALUATION, policy)


def _check_free(new: Run) -> None:
    """Raise UsageError (exit 2) when there is a run, or anything else, of that name."""
    if os.path.lexists(new.path):
        raise UsageError(f"{new.path}: is there already; give the fork another name")


def _check_fixed(source: ActiveRun, new: ActiveRun) -> None:
    """Raise UsageError for what every iteration of `source` stands on and `new` would have otherwise."""
    created = created_config(source.name, source.root)
    for key, before, after in (
        ("seed", created.seed, new.config.seed),
        ("model", created.model, new.config.model),
        ("prompts", created.prompts, new.config.prompts),
        ("update.reference", created.update.reference, new.config.update.reference),
    ):
        if before != after:
            raise UsageError(f"{key}: a fork shares it with {source.name}; a new `run:` can have another")


def describe(source: str, new: str, result: dict[str, Any]) -> str:
    """What a fork has in common with the other run, in words."""
    first, taken = result["iterations"], result["taken"]
    shared = f"{first} iterations" + (f", and of iteration {first} {', '.join(taken)}" if taken else "")
    return f"{new} begins as {source}: {shared}"


def _take_over(source: ActiveRun, staged: ActiveRun, iteration: int) -> list[str]:
    """Link the stages of `iteration` whose plan is the same, in order; returns their names."""
    taken = []
    for stage in STAGES:
        manifest = source.manifest(stage.output, iteration)
        # Rollouts that want another round are taken with the rewards that say so.
        failed = stage.name != "generate" and lacking(source, manifest)
        if manifest is None or failed or differences_of(staged, stage, manifest):
            break
        _link(source, staged, stage.output, iteration)
        taken.append(stage.name)
    return taken


def _link(run: Run, staged: Run, output: str, iteration: int | None) -> None:
    """Link a committed output; its manifest last, as a commit would have it."""
    manifest = run.require(output, iteration, "grpo run")
    source, target = run.folder(output, iteration), staged.folder(output, iteration)
    notes = [path for path in (source / TIMINGS, source / PRUNED) if path.exists()]
    held = [run.path_of(file, output, iteration) for file in manifest.files]
    if source / PRUNED in notes:
        held = [path for path in held if path.exists()]
    paths = [*notes, *held, source / MANIFEST]
    for path in paths:
        place = target / path.relative_to(source)
        files.make_folder(place.parent)
        files.link_file(path, place)
    for folder in {(target / path.relative_to(source)).parent for path in paths}:
        files.sync_folder(folder)
