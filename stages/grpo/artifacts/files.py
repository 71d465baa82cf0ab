"""artifacts.files: the only place that writes, moves and removes files of a run.

A file appears under its name complete and on disk, or not at all: temporary file, fsync, rename. A folder
entry is on disk once its folder was synced, which the caller does at the points of the commit scheme.
"""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grpo.artifacts.faults import operation
from grpo.errors import CorruptError, ResourceError

_CHUNK_BYTES = 2**22
_making = threading.Lock()  # a folder that one thread has made is on disk before another uses it
_RESOURCE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EMFILE,
    errno.EXDEV,  # a hard link to another disk
    errno.EMLINK,
    errno.ESTALE,  # of a file that another machine has replaced
    errno.ETIMEDOUT,
}


@contextmanager
def resource_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a failing disk or missing rights into a ResourceError (exit 7) naming `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _RESOURCE_ERRORS:
            raise
        raise ResourceError(f"{path}: {error.strerror}; {free_space(path)}") from error


def free_space(path: Path) -> str:
    """How much room is left on the disk of `path`, in words."""
    existing = next((folder for folder in path.absolute().parents if folder.exists()), None)
    if existing is None:
        return "free space unknown"
    return f"{shutil.disk_usage(existing).free / 2**20:.0f} MiB free on its disk"


def write_file(path: Path, content: bytes) -> None:
    """Write `content` under `path`, complete and synced, or not at all."""
    write_chunks(path, [content])


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """The same of a content that comes in pieces; returns its length in bytes and its sha256."""
    temporary = path.with_name(path.name + ".tmp")
    num_bytes, digest = 0, hashlib.sha256()
    with resource_errors(path):
        temporary.unlink(missing_ok=True)  # it may be a link, or have another name
        try:
            operation("write", temporary)
            with temporary.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
                    num_bytes += len(chunk)
                file.flush()
                operation("fsync", temporary)
                os.fsync(file.fileno())
            operation("rename", temporary, path)
            temporary.replace(path)
        finally:  # where the disk is full, say, what was written is no use to anybody
            temporary.unlink(missing_ok=True)
    return num_bytes, digest.hexdigest()


def create_file(path: Path, content: bytes) -> bool:
    """Write `content` where nothing is, not synced; False: something is. Of two that try at once one wins."""
    with resource_errors(path):
        operation("write", path)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, content)
        finally:
            os.close(descriptor)
    return True


def replace_unsynced(path: Path, content: bytes) -> None:
    """Write `content` in the place of a file, whole, not synced: of what a loss of power makes worthless.

    No operation(): it is done by the clock, and those are counted.
    """
    temporary = path.with_name(path.name + ".tmp")
    with resource_errors(path):
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)


def mark(path: Path) -> None:
    """Make a file whose being there says it all."""
    with resource_errors(path):
        operation("write", path)
        if not path.is_symlink():  # what it leads to is not ours
            path.touch()
    sync_folder(path.parent)


def link_file(source: Path, target: Path) -> None:
    """Give the file `source` a second name; an existing target is replaced. CorruptError for what is none."""
    if source.is_symlink():  # its second name would lead there too
        raise CorruptError(f"{source}: is a link, and a run has none; `grpo verify --discard` removes it")
    if source.exists() and not source.is_file():  # a folder in its place, say
        raise CorruptError(f"{source}: is no file; `grpo verify` says what to do")
    temporary = target.with_name(target.name + ".tmp")
    with resource_errors(target):
        temporary.unlink(missing_ok=True)
        operation("link", source, temporary)
        os.link(source, temporary)
        operation("rename", temporary, target)
        temporary.replace(target)


def make_folder(path: Path, sync: bool = True) -> None:
    """Make `path` and what is missing above it, each entry on disk; without `sync` the caller does that."""
    with _making:
        missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
        for folder in reversed(missing):
            with resource_errors(folder):
                operation("mkdir", folder)
                folder.mkdir(exist_ok=True)
            if sync:
                sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Make the entries of the folder `path` durable."""
    with resource_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            operation("fsync_folder", path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename `source` to `target`, which must not exist."""
    with resource_errors(target):
        operation("rename", source, target)
        source.rename(target)


def remove_file(path: Path) -> None:
    """Remove a file if it is there."""
    with resource_errors(path):
        operation("unlink", path)
        path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, or a folder and what is in it, if it is there. A link goes, never what it leads to."""
    if path.is_symlink() or not path.is_dir():
        remove_file(path)
        return
    for entry in reversed([*entries_below(path)]):
        if entry.is_dir(follow_symlinks=False):
            _remove_empty(Path(entry.path))
        else:
            remove_file(Path(entry.path))
    _remove_empty(path)


def _remove_empty(path: Path) -> None:
    with resource_errors(path):
        operation("rmdir", path)
        path.rmdir()


def entries_below(folder: Path, apart: Path | None = None) -> Iterator[os.DirEntry[str]]:
    """All that is below a folder, each folder before what is in it; links are named and never followed.

    apart: a folder that is named only.
    """
    waiting = [str(folder)]
    while waiting:
        with suppress(FileNotFoundError), os.scandir(waiting.pop()) as found:  # removed meanwhile
            for entry in sorted(found, key=lambda entry: entry.name):
                yield entry
                if entry.is_dir(follow_symlinks=False) and entry.path != str(apart):
                    waiting.append(entry.path)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, read in chunks. Raises ResourceError where it cannot be read."""
    digest = hashlib.sha256()
    with resource_errors(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
