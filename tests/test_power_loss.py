"""The power fails: what was not synced is gone.

The operations of a command are recorded with the content they write, and replayed on a model of a disk: the
content of a file is durable once the file was synced, an entry of a folder once the folder was. For a failure
after the n-th operation the disk is laid out with what is durable alone; with all entries, but the content of
unsynced files lost; and with a choice of both by chance. Then the same command runs.
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests import crash

pytestmark = pytest.mark.slow


@dataclass
class File:
    """A file as an inode. durable: its content on disk, None as long as it was never synced."""

    durable: bytes | None = None


@dataclass
class Folder:
    """A folder as an inode; entries: name -> inode, as processes see it and as the disk has it."""

    entries: dict[str, "File | Folder"] = field(default_factory=dict)
    durable: dict[str, "File | Folder"] = field(default_factory=dict)


class Disk:
    """The model, of all below the present folder, which is durable at the start."""

    def __init__(self, start: Path) -> None:
        self.top = _load(start)

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

    def apply(self, operation: crash.Operation) -> None:
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

    def lay_out(self, target: Path, keep: Callable[[], bool]) -> None:
        """Write what the disk may hold now: what is durable, and of each other change what keep() says."""
        shutil.rmtree(target, ignore_errors=True)
        _lay_out(self.top, target, keep)


def _load(folder: Path) -> Folder:
    entries = {
        path.name: _load(path) if path.is_dir() else File(path.read_bytes()) for path in folder.iterdir()
    }
    return Folder(entries, dict(entries))


def _lay_out(folder: Folder, target: Path, keep: Callable[[], bool]) -> None:
    target.mkdir(parents=True)
    held = dict(folder.durable)
    for name in sorted({*folder.durable, *folder.entries}):
        before, after = folder.durable.get(name), folder.entries.get(name)
        if before is after or not keep():
            continue
        held.pop(name, None)
        if after is not None:
            held[name] = after
    for name, inode in held.items():
        if isinstance(inode, Folder):
            _lay_out(inode, target / name, keep)
        else:
            (target / name).write_bytes(inode.durable or b"")


def nothing() -> bool:
    """No change that was not synced has reached the disk."""
    return False


def everything() -> bool:
    """Every change of a folder has; the content of a file that was not synced has not."""
    return True


def survives(disk: Disk, command: list[str], expected: dict[str, str], folder: Path, seed: int) -> str | None:
    """What is wrong after a failure now and the same command again, in each of three ways; None: nothing."""
    chance = random.Random(seed)
    for keep in (nothing, everything, lambda: chance.random() < 0.5):
        disk.lay_out(folder, keep)
        code, err = crash.in_child(folder, command)
        if code != 0:
            return f"exit {code}: {err}"
        if crash.contents(folder) != expected:
            return "other contents"
        code, err = crash.in_child(folder, ["verify"])
        if code != 0:
            return f"verify: exit {code}: {err}"
    return None


@pytest.fixture(params=["run", "from"])
def scenario(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def start(scenario: str, write_project: Callable[[Path], Path], complete: Path, tmp_path: Path) -> Path:
    begun = crash.SCENARIOS[scenario][0]
    return crash.copy(complete, tmp_path / "start") if begun else write_project(tmp_path / "start")


def test_nothing_is_lost_when_the_power_fails(scenario: str, start: Path, tmp_path: Path) -> None:
    command = crash.SCENARIOS[scenario][1]
    operations = crash.recorded(crash.copy(start, tmp_path / "undisturbed"), command)
    expected = crash.contents(tmp_path / "undisturbed")
    disk, tried = Disk(start), crash.points(len(operations), 23)
    for number, operation in enumerate(operations, 1):
        disk.apply(operation)
        if number in tried:
            wrong = survives(disk, command, expected, tmp_path / "failed", number)
            assert wrong is None, (number, operation, wrong)
    print(f"power loss, {scenario}: {3 * len(tried)} states of {3 * len(operations)} tried, all held")


def test_every_sync_is_needed(scenario: str, start: Path, tmp_path: Path) -> None:
    """Each fsync in turn does nothing: some state is then damaged."""
    command = crash.SCENARIOS[scenario][1]
    operations = crash.recorded(crash.copy(start, tmp_path / "undisturbed"), command)
    expected = crash.contents(tmp_path / "undisturbed")
    places = sorted({o.place for o in operations if o.kind.startswith("fsync")})
    needed = {
        place: damaged_without(place, operations, start, command, expected, tmp_path) for place in places
    }
    for place, wrong in needed.items():
        print(f"{scenario}: without the sync of {place}: {wrong}")
    assert all(needed.values())


def damaged_without(
    place: str,
    operations: list[crash.Operation],
    start: Path,
    command: list[str],
    expected: dict[str, str],
    folder: Path,
) -> str | None:
    """The first damage that a failure does when the syncs of `place` do nothing."""
    disk = Disk(start)
    for number, operation in enumerate(operations, 1):
        if operation.place == place and operation.kind.startswith("fsync"):
            continue
        disk.apply(operation)
        if wrong := survives(disk, command, expected, folder / "failed", number):
            return f"operation {number}: {wrong.splitlines()[0]}"
    return None
