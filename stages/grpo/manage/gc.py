"""gc: `grpo gc`, what a run no longer needs: trash, abandoned staging and weights, checkpoints not kept."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo.artifacts import (
    OUTPUTS,
    ActiveRun,
    Run,
    droppable,
    files,
    iterations_in,
    lent_folders,
    prune,
    staged_attempts,
    staging_folders,
)
from grpo.console import printable, stdout_console
from grpo.errors import InputError, UsageError
from grpo.pipeline.stages import EVALUATE, STAGES

_SMALL = 2**20 // 10  # bytes; what a person reads is in tenths of a MiB


def garbage(run: ActiveRun, keep_last: int | None = None) -> dict[str, Any]:
    """All that `grpo gc` would remove, in order.

    keep_last: keep so many checkpoints, and no others; None: as configured.
    Raises CorruptError (exit 6) where a folder of the run is a link.
    """
    run.refuse_links()
    found = [("trash", path, [path]) for path in _entries(run.trash)]
    found += [("abandoned staging", path, [path]) for path in _abandoned(run)]
    found += [("lent weights", path, [path]) for path in lent_folders(run)]
    for paths in droppable(run, keep_last).values():
        found += [("checkpoint", path, [path]) for path in paths]
    rows = [{"what": what, "path": path, "bytes": sum(map(_size, paths))} for what, path, paths in found]
    return {"run": run.name, "garbage": rows, "bytes": sum(row["bytes"] for row in rows)}


def collect(run: ActiveRun, keep_last: int | None = None) -> dict[str, Any]:
    """Remove it, and return what was removed. Needs the lock."""
    found = garbage(run, keep_last)
    for row in found["garbage"]:
        if row["what"] != "checkpoint":
            files.remove(row["path"])
    prune(run, keep_last)
    for folder in _folders(run).values():
        if not _entries(folder):
            files.remove(folder)
    return found


def _abandoned(run: ActiveRun) -> list[Path]:
    """Staged work that no command would go on with: of a plan that is no longer the configured one.

    Of an output that is not committed it stays, of whatever plan: the configuration may come back to it, and
    what the commit supersedes goes then.
    """
    wanted = {
        path
        for path, (output, iteration) in staging_folders(run).items()
        if iteration is None or output not in OUTPUTS or run.manifest(output, iteration) is None
    }
    folders = _folders(run)
    for iteration in {*run.iterations(), *folders}:
        for stage in (*STAGES, EVALUATE):
            # Where what it reads is not there, nothing of it is staged at this plan.
            with suppress(InputError, UsageError):
                plan, root = stage.plan(run, iteration), run.staging_root(iteration)
                attempts = staged_attempts(run, plan)
                wanted |= {root / f"{plan.output}-{plan.fingerprint(each)[:16]}" for each in attempts}
    roots = [run.staging_root(None), *folders.values()]
    entries = [path for root in roots for path in _entries(root)]
    return [path for path in entries if path not in roots and path not in wanted]


def print_garbage(found: dict[str, Any], run: Run, dry_run: bool) -> None:
    """The list as a person reads it; what is too small to count is one line for each kind."""
    out, rows = stdout_console(), found["garbage"]
    small = [row for row in rows if row["bytes"] < _SMALL]
    kinds = {row["what"]: [each["bytes"] for each in small if each["what"] == row["what"]] for row in small}
    lines = [(sum(sizes), f"{what:<18} {len(sizes)} below 0.1 MiB") for what, sizes in kinds.items()]
    for row in rows:
        if row not in small:
            path = row["path"]  # of weights, it may be elsewhere
            shown = path.relative_to(run.path) if path.is_relative_to(run.path) else path
            lines.append((row["bytes"], f"{row['what']:<18} {printable(str(shown))}"))
    lines.append((found["bytes"], f"{'would be removed' if dry_run else 'removed'} from run {run.name}"))
    for size, text in lines:
        out.print(f"{size / 2**20:10,.1f} MiB  {text}", markup=False, highlight=False)


def _folders(run: Run) -> dict[int, Path]:
    return {number: run.staging_root(number) for number in iterations_in(run.staging_root(None))}


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    every = files.entries_below(path)
    return sum(entry.stat(follow_symlinks=False).st_size for entry in every if not entry.is_dir())
