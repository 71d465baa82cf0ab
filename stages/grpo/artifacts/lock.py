"""artifacts.lock: one process works on a run, and another one is told which.

The kernel's lock is held by one process of a machine, and where a file system passes locks on, of all. On one
that does not, a lease beside it says who is at work. Where both are of one machine the lock alone decides: it
is free once its holder has ended, however that was.
"""

import errno
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from grpo.artifacts import files, lease
from grpo.artifacts.files import resource_errors
from grpo.artifacts.lease import Lease
from grpo.errors import CorruptError, GrpoError, LockedError, ResourceError

LEASE = ".lease.json"
_LOOKS, _PAUSE_S = 100, 0.005  # at the note of a holder that has the lock and has not written it yet
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def lock(folder: Path, say: Callable[[str], None], stop: Callable[[], None]) -> Iterator[Lease]:
    """Hold `folder` for writing; LockedError (exit 5) at once when another process of this machine does.

    One of another machine is watched until that is certain: say is told, and stop raises to end it.
    """
    with kernel_lock(folder), _leased(folder, say, stop) as found:
        yield found


@contextmanager
def kernel_lock(folder: Path) -> Iterator[None]:
    """The lock alone. Raises ResourceError (exit 7) where the file system has none."""
    from filelock import FileLock, Timeout

    path = folder / ".lock"
    with resource_errors(path):
        if path.is_file() and path.stat().st_nlink > 1:  # taking the lock empties the file
            raise CorruptError(f"{path}: has another name too (a hard link), so it is no lock; remove it")
        # A lock by a file alone outlives a process that was killed.
        held = FileLock(path, timeout=0, fallback_to_soft=False)
        try:
            held.acquire()
        except Timeout:
            raise LockedError(f"{folder}: in use by {_holder(path)}; wait for it, or stop it") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            way = "mount it with them (NFS 4; `flock` of Lustre), or keep the runs elsewhere"
            raise ResourceError(f"{path}: no locks on this file system ({error.strerror}); {way}") from None
    try:
        with resource_errors(path):
            path.write_text(f"pid {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        held.release()


@contextmanager
def _leased(folder: Path, say: Callable[[str], None], stop: Callable[[], None]) -> Iterator[Lease]:
    """Hold the lease of a folder whose lock is held: the holder of a lease of this kernel has ended."""
    found = Lease(_File(folder), lease.new_epoch(), lease.CLOCK)
    found.take(lambda holder: holder.kernel == lease.this_kernel(), say, stop)
    found.keep()
    is_done = False
    try:
        yield found
        is_done = True
    finally:
        with nullcontext() if is_done else suppress(GrpoError):  # what ended the command is what is said
            found.release()


class _File:
    """`.lease.json` of a folder, which is there while a command works in it; a version's tag is its text.

    Not synced: what it says ends with the processes of a machine that loses power.
    """

    stopped = "this command has stopped, and what it had committed stays"

    def __init__(self, folder: Path) -> None:
        self.name = self.log = str(folder)
        self._path = folder / LEASE

    def read(self) -> tuple[bytes, str] | None:
        content = b""
        for _ in range(_LOOKS):
            try:
                with resource_errors(self._path):
                    content = self._path.read_bytes()
            except FileNotFoundError:
                return None
            if content:
                return content, content.decode(errors="replace")
            time.sleep(_PAUSE_S)
        nobody = lease.Holder("", 0, "", "", released=True)  # who made it has ended before it was written
        return nobody.encode(), ""

    def create(self, content: bytes) -> str | None:
        return content.decode() if files.create_file(self._path, content) else None

    def replace(self, content: bytes, tag: str) -> str | None:
        found = self.read()
        if found is None or found[1] != tag:
            return None
        try:
            files.replace_unsynced(self._path, content)
        except (FileExistsError, FileNotFoundError):  # another command writes it, or removes the folder
            raise LockedError(f"{self.name}: taken over by another command; {self.stopped}") from None
        except OSError as error:  # of whatever kind: a thread asks
            raise ResourceError(f"{self._path}: {error.strerror}") from None
        return content.decode()

    def release(self, content: bytes, tag: str) -> None:
        found = self.read()
        if found is not None and found[1] == tag:
            files.remove_file(self._path)


def holder_here(folder: Path) -> str:
    """The process of this machine that holds `folder`, as lock() noted it; empty: none is known.

    The lock is not tried: a command that begins meanwhile would find it taken.
    """
    path = folder / ".lock"
    try:
        found = re.fullmatch(r"pid ([0-9]{1,9}) on (\S+)", path.read_text(errors="replace").strip())
    except (OSError, ValueError):  # nobody ever held it, it is not ours to read, or the name is none
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
