"""disk: a model of a disk that remembers what was synced.

The content of a file is durable once the file was synced, an entry of a folder once the folder was.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.crash import Operation


@dataclass
class File:
    """A file as an inode. durable: its content on disk, None as long as it was never synced."""

    durable: bytes | None = None


@dataclass
class Folder:
    """A folder as an inode; entries: name -> inode, as processes see it and as the disk has it."""

    entries: dict[str, "File | Folder"] = field(default_factory=dict)
    durable: dict[str, "File | Folder"] = field(default_factory=dict)


Change = tuple[int, str]  # id of a folder, name of an entry


class Disk:
    """All below one folder, which is durable at the start; paths of operations are relative to it."""

    def __init__(self, start: Path) -> None:
        self.top = _load(start)

    def apply(self, operation: Operation) -> None:
        """Do one operation."""
        if operation.kind == "fsync_folder":
            synced = self._folder(Path(operation.path).parts)
            synced.durable = dict(synced.entries)
            return
        folder, name = self._place(operation.path)
        if operation.kind == "write":
            folder.entries[name] = File()
        elif operation.kind == "fsync":
            file = folder.entries[name]
            assert isinstance(file, File)
            file.durable = operation.content
        elif operation.kind == "mkdir":
            folder.entries[name] = Folder()
        elif operation.kind in ("unlink", "rmdir"):
            folder.entries.pop(name, None)
        else:
            assert operation.other is not None
            target, new = self._place(operation.other)
            moves = operation.kind == "rename"
            target.entries[new] = folder.entries.pop(name) if moves else folder.entries[name]

    def lost(self) -> list[str]:
        """What processes see as committed, by a sidecar or a manifest, and the disk does not have whole."""
        found = []
        for path, inode, durable in _files(self.top, Path(), True):
            hidden = [part for part in path.parts if part.startswith(".")]
            shard = path.name.endswith(".sidecar.json") and ".staging" in hidden
            output = path.name == "manifest.json" and not hidden
            if (shard or output) and not (durable and inode.durable is not None):
                found.append(str(path))
        return found

    def states(self) -> list[list[Change]]:
        """Changes of folders that are not durable and yet may be on disk: none, all, and each one alone."""
        pending = list(_pending(self.top))
        return [[], *([pending] if len(pending) > 1 else []), *([change] for change in pending)]

    def contents(self, changes: Collection[Change]) -> dict[str, bytes | None]:
        """What the disk may hold now, by path: what is durable, and those `changes` that are not.

        None stands for a folder. Temporary files are left out: nobody reads them.
        """
        found = dict(_contents(self.top, "", set(changes)))
        return {path: content for path, content in found.items() if not path.endswith(".tmp")}

    def _folder(self, parts: tuple[str, ...]) -> Folder:
        found = self.top
        for part in parts:
            step = found.entries[part]
            assert isinstance(step, Folder), parts
            found = step
        return found

    def _place(self, path: str) -> tuple[Folder, str]:
        *parents, name = Path(path).parts
        return self._folder(tuple(parents)), name


def _load(folder: Path) -> Folder:
    entries = {
        path.name: _load(path) if path.is_dir() else File(path.read_bytes()) for path in folder.iterdir()
    }
    return Folder(entries, dict(entries))


def _files(folder: Folder, where: Path, durable: bool) -> Iterator[tuple[Path, File, bool]]:
    """Every file that processes see, and whether all entries of its path are durable."""
    for name, inode in folder.entries.items():
        there = durable and folder.durable.get(name) is inode
        if isinstance(inode, Folder):
            yield from _files(inode, where / name, there)
        else:
            yield where / name, inode, there


def _pending(folder: Folder) -> Iterator[Change]:
    for name in sorted({*folder.durable, *folder.entries}):
        before, after = folder.durable.get(name), folder.entries.get(name)
        if before is not after:
            yield id(folder), name
        for inode in {id(each): each for each in (before, after)}.values():
            if isinstance(inode, Folder):
                yield from _pending(inode)


def _contents(folder: Folder, where: str, changes: set[Change]) -> Iterator[tuple[str, bytes | None]]:
    yield where, None
    for name in sorted({*folder.durable, *folder.entries}):
        changed = (id(folder), name) in changes
        inode = (folder.entries if changed else folder.durable).get(name)
        if isinstance(inode, Folder):
            yield from _contents(inode, f"{where}{name}/", changes)
        elif inode is not None:
            yield f"{where}{name}", inode.durable or b""
