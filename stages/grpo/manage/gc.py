"""gc: `grpo gc`, what a run no longer needs: trash, abandoned staging, checkpoints that are not kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.artifacts import (
    OUTPUTS,
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


@dataclass(frozen=True)
class Garbage:
    """Something to remove: a folder, or the checkpoint of an update (`path` is then the update's)."""

    what: str
    path: Path
    bytes: int


def garbage(run: ActiveRun) -> list[Garbage]:
    """All that `grpo gc` would remove, in the order in which it does."""
    found = [Garbage("trash", path, _size(path)) for path in _entries(run.trash)]
    found += [Garbage("abandoned staging", path, _size(path)) for path in abandoned(run)]
    for iteration, paths in droppable(run).items():
        found.append(Garbage("checkpoint", run.folder("update", iteration), sum(map(_size, paths))))
    return found


def collect(run: ActiveRun) -> list[Garbage]:
    """Remove it, and return what was removed. Needs the lock."""
    found = garbage(run)
    for each in found:
        if each.what != "checkpoint":
            _remove(each.path)
    prune(run)
    for iteration in iterations_in(run.path / ".staging"):
        if not _entries(run.staging_root(iteration)):
            files.remove_folder(run.staging_root(iteration))
    return found


def abandoned(run: ActiveRun) -> list[Path]:
    """Staged work that no command would go on with: of a plan that is no longer the configured one.

    Of an output that is not committed it stays, of whatever plan: the configuration may come back to it, and
    what the commit supersedes goes then.
    """
    root = run.path / ".staging"
    wanted = {folder for folder in staging_folders(run) if not _is_committed(run, folder)}
    for iteration in {*run.iterations(), *iterations_in(root)}:
        for stage in (*STAGES, EVALUATE):
            try:
                plan = stage.plan(run, iteration)
            except (InputError, UsageError):
                continue  # what it reads is not there yet, so nothing of it is staged at this plan
            for attempt in staged_attempts(run, plan):
                wanted.add(run.staging_root(iteration) / f"{plan.output}-{plan.fingerprint(attempt)[:16]}")
    folders = {run.staging_root(iteration) for iteration in iterations_in(root)}
    found = [path for path in _entries(root) if path not in folders]
    found += [path for folder in sorted(folders) for path in _entries(folder)]
    return [path for path in found if path not in wanted]


def _is_committed(run: Run, staged: Path) -> bool:
    output = staged.name.rpartition("-")[0]
    return any(
        run.manifest(output, iteration) is not None
        for iteration in iterations_in(run.path / ".staging")
        if output in OUTPUTS and staged.parent == run.staging_root(iteration)
    )


def describe(found: list[Garbage], run: Run, dry_run: bool) -> dict[str, Any]:
    """The list as plain data."""
    rows = [{"what": each.what, "path": str(each.path), "bytes": each.bytes} for each in found]
    total = sum(each.bytes for each in found)
    return {"run": run.name, "dry_run": dry_run, "garbage": rows, "bytes": total}


def print_garbage(found: list[Garbage], run: Run, dry_run: bool) -> None:
    """The list as a person reads it."""
    out = stdout_console()
    for each in found:
        place = each.path.relative_to(run.path)
        out.print(f"{each.bytes / 2**20:10,.1f} MiB  {each.what:<18} {place}", markup=False, highlight=False)
    total = sum(each.bytes for each in found) / 2**20
    verb = "would be removed" if dry_run else "removed"
    out.print(f"{total:10,.1f} MiB  {verb} from run {run.name}", highlight=False)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    every = path.rglob("*") if path.is_dir() else [path]
    return sum(found.stat().st_size for found in every if found.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        files.remove_folder(path)
    else:
        files.remove_file(path)
