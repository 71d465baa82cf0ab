"""fork: a run that begins as another one did, by hard links: nothing is copied, the other stays as it is.

Committed files are never written again, only replaced, so that two runs can share them.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from operator import attrgetter
from typing import Any

from grpo.artifacts import (
    CHECKPOINT,
    EVALUATION,
    MANIFEST,
    RUN_OUTPUTS,
    SOURCES,
    STAGE_OUTPUTS,
    TIMINGS,
    ActiveRun,
    Origin,
    Run,
    created_config,
    files,
    is_durable,
    kept_sources,
    lacking,
    origin_of,
)
from grpo.artifacts.lock import LEASE
from grpo.artifacts.manifest import check_size
from grpo.config import PIPELINE
from grpo.config.yaml import dump
from grpo.errors import GrpoError, InputError, ResourceError, UsageError
from grpo.pipeline.prepare import run_json
from grpo.pipeline.stages import EVALUATE, STAGES
from grpo.pipeline.states import differences_of
from grpo.prompts.table import HELD_OUT


def fork(source: ActiveRun, new: ActiveRun, iteration: int | None) -> dict[str, Any]:
    """Make the run `new`, with a configuration of its own, from iterations of `source` before `iteration`.

    Of that iteration too, what `new` would make in the same way. None: the one after those completed. Raises
    UsageError (exit 2) when `new` is there already or `source` has no such iteration, InputError (exit 4)
    when the policy to go on from can be had no more, CorruptError (exit 6) for a file verify would not take.
    """
    _check_free(new)
    source.refuse_links(files_too=True)  # a second name of a link would lead there too
    _check_fixed(source, new)
    first = next(n for n in count() if n == iteration or source.manifest("update", n) is None)
    if iteration not in (None, first):
        raise UsageError(f"--iteration {iteration}: run {source.name} has completed {first} iterations")
    origin = origin_of(source, first)
    config = new.config.model_copy(update={"run": f".fork-{new.name}"})
    staged = ActiveRun(new.root, config, new.imports, new.console)
    with _locked(staged, new):
        _check_free(new)
        for leftover in staged.path.iterdir():  # of a fork that was killed
            if leftover.name not in (".lock", LEASE):
                files.remove(leftover)
        try:
            taken = _link_all(source, staged, origin)
        except (FileNotFoundError, GrpoError) as error:
            with suppress(GrpoError):  # nobody goes on with it; the next fork of this name would remove it
                staged.release()
                files.remove(staged.path)
            if isinstance(error, GrpoError):
                raise
            raise InputError(
                f"{error.filename}: gone while it was linked; `grpo verify {source.name}` says whether it is"
                " damaged, else try again"
            ) from None
        files.write_file(staged.path / "run.json", run_json(new.config))
        files.write_file(staged.path / PIPELINE, dump(new.config.model_dump(exclude_unset=True)).encode())
        files.sync_folder(staged.path)
        staged.release()
        files.move(staged.path, new.path)
        files.sync_folder(new.root)
    return {"iterations": first, "taken": taken}


def describe(source: str, new: str, result: dict[str, Any]) -> str:
    """What a fork has in common with the other run, in words."""
    first, taken = result["iterations"], result["taken"]
    shared = f"{first} iterations" + (f", and of iteration {first} {', '.join(taken)}" if taken else "")
    return f"{new} begins as {source}: {shared}"


@contextmanager
def _locked(staged: ActiveRun, new: ActiveRun) -> Iterator[None]:
    """Of two forks of one name at once the other is exit 5; or 2, where this one is done by then."""
    with ExitStack() as held:
        try:
            held.enter_context(staged.lock(new.console))
        except (FileNotFoundError, ResourceError):
            _check_free(new)  # the folder got its name while we were about to take it
            raise
        yield


def _check_free(new: Run) -> None:
    if os.path.lexists(new.path):
        raise UsageError(f"{new.path}: is there already; give the fork another name")


def _check_fixed(source: ActiveRun, new: ActiveRun) -> None:
    """Raise UsageError for what every iteration of `source` stands on and `new` would have otherwise."""
    created = created_config(source.path)
    for key in ("seed", "model", "prompts", "update.reference"):
        of = attrgetter(key)
        if of(created) != of(new.config):
            raise UsageError(f"{key}: a fork shares it with {source.name}; a new `run:` can have another")


def _link_all(source: ActiveRun, staged: ActiveRun, origin: Origin) -> list[str]:
    """Link what policy `origin` came from, and of its iteration what can be taken over; those stages."""
    first = origin.policy
    if sources := kept_sources(source):
        files.make_folder(staged.path / SOURCES)
        for path in sources.values():
            files.link_file(path, staged.path / SOURCES / path.name)
        files.sync_folder(staged.path / SOURCES)
    for output in RUN_OUTPUTS:
        if output != HELD_OUT or source.manifest(output, None) is not None:
            _link(source, staged, output, None)
    for number in range(first):
        for output in STAGE_OUTPUTS:
            _link(source, staged, output, number)
    for policy in {origin.durable, source.config.update.moved_reference(first)}:
        if policy and is_durable(source, policy):
            _link(source, staged, CHECKPOINT, policy - 1)
    taken = []
    for stage in STAGES:
        manifest = source.manifest(stage.output, first)
        # Rollouts that want another round are taken with the rewards that say so.
        failed = stage.name != "generate" and lacking(source, manifest)
        if manifest is None or failed or differences_of(staged, stage, manifest):
            break
        _link(source, staged, stage.output, first)
        taken.append(stage.name)
    for policy in source.evaluations():
        manifest = source.manifest(EVALUATION, policy)
        if manifest is None or policy > first or lacking(source, manifest):
            continue
        # Policy `first` only as the fork would measure it, unless it was sampled from and so is history too.
        if policy < first or taken or not differences_of(staged, EVALUATE, manifest):
            _link(source, staged, EVALUATION, policy)
    if "update" in taken and is_durable(source, first + 1):
        _link(source, staged, CHECKPOINT, first)
    return taken


def _link(run: Run, staged: Run, output: str, iteration: int | None) -> None:
    """Link a committed output; its manifest last, as a commit would have it."""
    manifest = run.require(output, iteration, "grpo run")
    source, target = run.folder(output, iteration), staged.folder(output, iteration)
    held = [run.path_of(file, output, iteration) for file in manifest.files]
    timings = [path for path in [source / TIMINGS] if path.exists()]
    paths = [*timings, *held, source / MANIFEST]
    for file, path in zip(manifest.files, held, strict=True):
        if path.exists():
            check_size(file, path)
    places = [target / path.relative_to(source) for path in paths]
    for path, place in zip(paths, places, strict=True):
        files.make_folder(place.parent)
        files.link_file(path, place)
    for folder in {place.parent for place in places}:
        files.sync_folder(folder)
