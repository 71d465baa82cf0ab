"""gc: `grpo gc`, what a run no longer needs: trash, abandoned staging, checkpoints that are not kept."""

from collections.abc import Iterator
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


def garbage(run: ActiveRun) -> dict[str, Any]:
    """All that `grpo gc` would remove, in order; of a checkpoint, `path` is the folder of its update."""
    found = [("trash", path, [path]) for path in _entries(run.trash)]
    found += [("abandoned staging", path, [path]) for path in _abandoned(run)]
    for iteration, paths in droppable(run).items():
        found.append(("checkpoint", run.folder("update", iteration), paths))
    rows = [{"what": what, "path": path, "bytes": sum(map(_size, paths))} for what, path, paths in found]
    return {"run": run.name, "garbage": rows, "bytes": sum(row["bytes"] for row in rows)}


def collect(run: ActiveRun) -> dict[str, Any]:
    """Remove it, and return what was removed. Needs the lock."""
    found = garbage(run)
    for row in found["garbage"]:
        if row["what"] != "checkpoint":
            files.remove_folder(row["path"]) if row["path"].is_dir() else files.remove_file(row["path"])
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
    attempts = staged_attempts(run, plan)
    return staged.name in [f"{output}-{plan.fingerprint(attempt)[:16]}" for attempt in attempts]


def print_garbage(found: dict[str, Any], run: Run, dry_run: bool) -> None:
    """The list as a person reads it."""
    out = stdout_console()
    lines = [
        (row["bytes"], f"{row['what']:<18} {row['path'].relative_to(run.path)}") for row in found["garbage"]
    ]
    lines.append((found["bytes"], f"{'would be removed' if dry_run else 'removed'} from run {run.name}"))
    for size, text in lines:
        out.print(f"{size / 2**20:10,.1f} MiB  {text}", markup=False, highlight=False)


def _folders(run: Run) -> list[Path]:
    return [run.staging_root(iteration) for iteration in iterations_in(run.staging_root(None))]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    every = path.rglob("*") if path.is_dir() else [path]
    return sum(found.stat().st_size for found in every if found.is_file())
