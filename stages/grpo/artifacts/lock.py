"""artifacts.lock: one process works on a run, and another one is told which."""

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.artifacts.files import resource_errors
from grpo.errors import CorruptError, LockedError

_LOOKS, _PAUSE_S = 100, 0.005  # at the note of a holder that has the lock and has not written it yet


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for writing; LockedError (exit 5) at once when another process does."""
    from filelock import FileLock, Timeout

    path = folder / ".lock"
    with resource_errors(path):
        if path.is_file() and path.stat().st_nlink > 1:  # taking the lock empties the file
            raise CorruptError(f"{path}: has another name too (a hard link), so it is no lock; remove it")
        held = FileLock(path, timeout=0)
        try:
            held.acquire()
        except Timeout:
            raise LockedError(f"{folder}: in use by {_holder(path)}; wait for it, or stop it") from None
    try:
        with resource_errors(path):
            path.write_text(f"pid {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        held.release()


def holder_here(folder: Path) -> str:
    """The process of this machine that holds `folder`, as lock() noted it; empty: none is known.

    The lock is not tried: a command that begins meanwhile would find it taken.
    """
    path = folder / ".lock"
    try:
        found = re.fullmatch(r"pid ([0-9]{1,9}) on (\S+)", path.read_text(errors="replace").strip())
    except OSError:  # nobody ever held it, or it is not ours to read
        return ""
    if found is None or found[2] != socket.gethostname() or int(found[1]) == os.getpid():
        return ""
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return ""
    except PermissionError:  # it is there, and somebody else's
        pass
    return found[0]


def _holder(path: Path) -> str:
    for _ in range(_LOOKS):
        if path.exists() and (found := path.read_text(errors="replace").strip()):
            return found
        time.sleep(_PAUSE_S)
    return "another process"
