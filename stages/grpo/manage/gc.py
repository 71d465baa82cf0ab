"""gc: `grpo gc`, what a run no longer needs: trash, abandoned staging, checkpoints that are not kept."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo.artifacts import (
    ActiveRun,
    Run,
    droppable,
    files,
    iterations_in,
    prune,
    staged_attempts,
    staging_folders,
)
from grpo.console import stdout_console
from grpo.errors import InputError, UsageError
from grpo.pipeline.stages import EVALUATE, STAGES

_STAGES = {stage.output: stage for stage in (*STAGES, EVALUATE)}


@dataclass(frozen=True)
class Garbage:
    """Something to remove: a folder, or the checkpoint of an update (`path` is then the update's)."""

    what: str
    path: Path
    bytes: int


def garbage(run: ActiveRun) -> list[Garbage]:
    """All that `grpo gc` would remove, in the order in which it does."""
    found = [("trash", path, [path]) for path in _entries(run.trash)]
    found += [("abandoned staging", path, [path]) for path in _abandoned(run)]
    for iteration, paths in droppable(run).items():
        found.append(("checkpoint", run.folder("update", iteration), paths))
    return [Garbage(what, path, sum(map(_size, paths))) for what, path, paths in found]


def collect(run: ActiveRun) -> list[Garbage]:
    """Remove it, and return what was removed. Needs the lock."""
    found = garbage(run)
    for each in found:
        if each.what != "checkpoint":
            files.remove_folder(each.path) if each.path.is_dir() else files.remove_file(each.path)
    prune(run)
    for folder in _folders(run):
        if not _entries(folder):
            files.remove_folder(folder)
    return found


def _abandoned(run: ActiveRun) -> Iterator[Path]:
    """Staged work that no command would go on with: of a plan that is no longer the configured one.

    Of an output that is not committed it stays, of whatever plan: the configuration may come back to it, and
    what the commit supersedes goes then.
    """
    staged, folders = staging_folders(run), _folders(run)
    for root in (run.staging_root(None), *folders):
        for path in _entries(root):
            if path not in folders and not (path in staged and _is_wanted(run, path, *staged[path])):
                yield path


def _is_wanted(run: ActiveRun, staged: Path, output: str, iteration: int | None) -> bool:
    stage = _STAGES.get(output)
    if stage is None or iteration is None or run.manifest(output, iteration) is None:
        return True
    try:
        plan = stage.plan(run, iteration)
    except (InputError, UsageError):
        return False  # what it reads is not there yet, so nothing of it is staged at this plan
    fingerprints = [plan.fingerprint(attempt) for attempt in staged_attempts(run, plan)]
    return staged.name in [f"{output}-{fingerprint[:16]}" for fingerprint in fingerprints]


def describe(found: list[Garbage], run: Run, dry_run: bool) -> dict[str, Any]:
    """The list as plain data."""
    total = sum(each.bytes for each in found)
    return {"run": run.name, "dry_run": dry_run, "garbage": list(map(asdict, found)), "bytes": total}


def print_garbage(found: list[Garbage], run: Run, dry_run: bool) -> None:
    """The list as a person reads it."""
    out = stdout_console()
    lines = [(each.bytes, f"{each.what:<18} {each.path.relative_to(run.path)}") for each in found]
    verb = "would be removed" if dry_run else "removed"
    lines.append((sum(each.bytes for each in found), f"{verb} from run {run.name}"))
    for size, text in lines:
        out.print(f"{size / 2**20:10,.1f} MiB  {text}", markup=False, highlight=False)


def _folders(run: Run) -> list[Path]:
    return [run.staging_root(iteration) for iteration in iterations_in(run.staging_root(None))]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    every = path.rglob("*") if path.is_dir() else [path]
    return sum(found.stat().st_size for found in every if found.is_file())
