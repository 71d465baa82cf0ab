"""disk: room for the checkpoints of a run, and whether the file system does what the commit scheme needs.

Everything is tried, in a temporary folder beside the runs: file systems say of themselves what is not so.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from grpo.artifacts import Run, files
from grpo.errors import GrpoError, ResourceError
from grpo.manage.doctor.check import Check, failed, gib
from grpo.manage.doctor.checkpoint import Checkpoint

WEIGHT_BYTES, OPTIMIZER_BYTES = 4, 8  # of a parameter in a committed checkpoint, float32
# A second process; exit status 0: it got the lock, 3: it did not.
_TRY_LOCK = (
    "import sys, filelock\n"
    "try:\n    filelock.FileLock(sys.argv[1], timeout=0, fallback_to_soft=False).acquire()\n"
    "except filelock.Timeout:\n    sys.exit(3)"
)
_NEEDED = "rename over a file, fsync, hard link, move of a folder"


def check_space(run: Run, policy: Checkpoint) -> list[Check]:
    """Free space against the checkpoints still to come; nothing where the model's size is not known."""
    if policy.parameters is None:
        return []
    place = _existing(run.root)
    free = shutil.disk_usage(place).free
    done = sum(run.manifest("update", iteration) is not None for iteration in run.iterations())
    left = max(0, run.config.iterations - done)
    config = run.config.checkpoints
    stay = left
    if config.keep_last is not None:
        # One more than is kept: the oldest goes when the newest is committed.
        stay = min(left, config.keep_last + 1 + (left // config.keep_every if config.keep_every else 0))
    # That of an adapter is left out: it is a small part of the weights.
    optimizer_bytes = 0 if run.config.update.lora else OPTIMIZER_BYTES
    need = stay * (WEIGHT_BYTES + optimizer_bytes) * policy.parameters
    found, needed = f"{gib(free)} free at {place}", f"{gib(need)}: {left} iterations to come"
    if need <= free:
        return [Check("disk space", found, needed, note="left out: the tables, about 4 bytes per token")]
    each = gib((WEIGHT_BYTES + optimizer_bytes) * policy.parameters)
    text = f"{place}: {gib(free)} free, {gib(need)} needed, since checkpoints of {each} each stay"
    return [failed("disk space", found, needed, ResourceError(f"{text}; free some, or lower iterations"))]


def check_file_system(run: Run) -> list[Check]:
    """Do once what every commit does. Leaves nothing behind."""
    place = _existing(run.root)
    try:
        with files.resource_errors(place), tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as name:
            return [_try_files(Path(name), place), _try_lock(Path(name) / "lock", place)]
    except OSError as error:
        error_here = ResourceError(f"{place}: {error.strerror or error}; runs need a folder to write in")
        return [failed("file system", str(place), _NEEDED, error_here)]
    except GrpoError as error:
        return [failed("file system", str(place), _NEEDED, error)]


def _try_files(folder: Path, place: Path) -> Check:
    doing = "fsync"
    try:
        files.make_folder(folder / "staged")
        first, second = folder / "staged" / "first", folder / "staged" / "second"
        files.write_file(first, b"old")
        doing = "rename over a file"
        files.write_file(first, b"new")
        _require(first.read_bytes() == b"new", place, "a rename leaves the old file")
        doing = "hard link"
        files.link_file(first, second)
        _require(first.samefile(second), place, "a hard link is another file")
        doing = "fsync of a folder"
        files.sync_folder(folder / "staged")
        doing = "move of a folder"
        files.move(folder / "staged", folder / "committed")
        _require((folder / "committed" / "second").read_bytes() == b"new", place, "a move loses files")
    except GrpoError as error:
        return failed("file system", str(place), _NEEDED, error)
    except OSError as error:
        text = f"{place}: no {doing} here: {error.strerror or error}; put artifacts/ on a local disk"
        return failed("file system", str(place), _NEEDED, ResourceError(text))
    return Check("file system", str(place), _NEEDED)


def _require(works: bool, place: Path, problem: str) -> None:
    if not works:
        raise ResourceError(f"{place}: {problem}; put artifacts/ on a local disk")


def _try_lock(path: Path, place: Path) -> Check:
    from filelock import FileLock

    needed = "a kernel lock that keeps a second process out"
    try:
        lock = FileLock(path, timeout=0, fallback_to_soft=False)
        with lock:
            _require(not second_process_gets(path), place, "a lock does not keep a second process out")
        _require(second_process_gets(path), place, "a lock that was released still keeps others out")
    except GrpoError as error:
        return failed("lock", str(place), needed, error)
    except OSError as error:
        text = f"{place}: no locks here: {error.strerror or error}; put artifacts/ on a local disk"
        return failed("lock", str(place), needed, ResourceError(text))
    return Check("lock", "held against a second process, then given to it", needed)


def second_process_gets(path: Path) -> bool:
    """Whether another process can have the lock `path` now."""
    status = subprocess.run([sys.executable, "-c", _TRY_LOCK, os.fspath(path)], check=False).returncode
    if status not in (0, 3):
        raise ResourceError(f"{path}: a second process could not try the lock (exit status {status})")
    return status == 0


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there: where a run would make it."""
    absolute = folder.absolute()
    found = next(path for path in (absolute, *absolute.parents) if path.exists())
    return folder if found == absolute else found
