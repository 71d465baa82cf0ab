"""The power fails: what was not synced is gone.

The operations of a command are recorded with the content they write, and replayed on a model of a disk. For
a failure after the n-th operation the disk is laid out in each of its states: with what is durable alone,
with all changes of folders, but the content of unsynced files lost, and with one of those changes. Then the
command goes on.
"""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tests.conftest import NewTally
from tests.faults import crash
from tests.faults.disk import Disk
from tests.faults.tally import CUT_OFF, TURN, extent

pytestmark = [pytest.mark.slow, pytest.mark.sampled]


@pytest.fixture(params=extent("commands with a power failure"))
def scenario(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Trial:
    """A command whose operations are known, to be cut off by a power failure."""

    def __init__(self, scenario: str, start: Path, folder: Path) -> None:
        self.name = scenario
        self.start = start
        self.folder = folder
        self.operations = crash.recorded(
            crash.copy(start, folder / "whole"), crash.SCENARIOS[scenario].command
        )
        self.held: set[int] = set()
        """States that were tried and found to do no harm."""
        self.before, self.after = crash.contents(start), crash.contents(folder / "whole")
        self.tables = set() if scenario == "gc" else tables(start)
        """Digests of what nothing but `gc` may lose."""
        syncs = [number for number, each in enumerate(self.operations) if "start_over" in each.place]
        self.promised = syncs[2] if syncs else None  # written, synced, renamed; then its name is synced
        """Operation from which on the next run finishes what `--from` began."""

    def wrong_after(self, disk: Disk, number: int) -> str | None:
        """What is wrong after a failure now and the command again, in one of the states; None: nothing.

        number: of operations that were done.
        """
        promised = self.promised is not None and number > self.promised + 1
        for changes in disk.states():
            contents = disk.contents(changes)
            state = hash((promised, *contents.items()))
            if state in self.held:
                continue
            lay_out(contents, self.folder / "failed")
            # One half of a rename alone: file systems with a journal have none, and nothing helps against it.
            whole = len(changes) != 1
            if wrong := (self._lost_now() if whole else None) or self._wrong_now(promised):
                return wrong
            self.held.add(state)
        return None

    def _lost_now(self) -> str | None:
        lost = self.tables - tables(self.folder / "failed")
        return f"{len(lost)} tables are neither in place nor in the trash" if lost else None

    def _wrong_now(self, promised: bool) -> str | None:
        folder = self.folder / "failed"
        code, err = crash.in_child(folder, ["verify"])
        if code not in (0, 2):  # 2: there is no run yet
            return f"verify, before anything is mended: exit {code}: {err}"
        shards = {
            name: {
                path.stat().st_ino for path in folder.rglob(name)
            }  # a move may have left it in both places
            for name in crash.finished_shards(folder)
        }
        whole = [
            name
            for name in crash.committed(folder)
            if crash.digest(folder, name) == self.after.get(crash.plain(name))
        ]
        before = {name: crash.inodes(folder, name) for name in whole}
        code, err = crash.in_child(folder, crash.SCENARIOS[self.name].resume)
        if code != 0 and not (self.name == "fork" and "is there already" in err):
            return f"exit {code}: {err.splitlines()[-1]}"
        found = crash.contents(folder)
        if found != self.after and (promised or found != self.before or not self.name.startswith("from")):
            return "other contents"
        after = crash.finished_shards(folder)
        again = [name for name in shards.keys() & after.keys() if after[name] not in shards[name]]
        if again:
            return f"{again[0]} was made again"
        for name, inode in crash.committed(folder).items():
            if inode not in before.get(name, {inode}):  # committed before the failure
                return f"{name} was made again"
        others = [path.name for path in folder.glob("artifacts/other")]
        for command in (["verify"], ["status"], *(["verify", name] for name in others)):
            code, err = crash.in_child(folder, command)
            if code != 0:
                return f"{command[0]}: exit {code}: {err.splitlines()[-1]}"
        return None


def tables(folder: Path) -> set[str]:
    """Digests of every table of a project, also of those that wait or were replaced."""
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.parquet")}


def lay_out(contents: dict[str, bytes | None], target: Path) -> None:
    """Write what a disk holds into the folder `target`."""
    shutil.rmtree(target, ignore_errors=True)
    for path, content in contents.items():
        if content is None:
            (target / path).mkdir(parents=True)
        else:
            (target / path).write_bytes(content)


@pytest.fixture
def trial(scenario: str, start: Path, tmp_path: Path) -> Trial:
    return Trial(scenario, start, tmp_path)


def test_nothing_is_lost_when_the_power_fails(trial: Trial, new_tally: NewTally) -> None:
    tally = new_tally("power loss (states)", trial.name)
    disk, every = Disk(trial.start), extent("operations before a power failure")
    for number, operation in enumerate(trial.operations, 1):
        assert lost_before(operation, disk) == [], number
        disk.apply(operation)
        if number % every == TURN % every:
            before = len(trial.held)
            wrong = trial.wrong_after(disk, number)
            with tally.trial(len(trial.held) - before + (wrong is not None)):
                assert wrong is None, (number, operation)
    assert disk.lost() == []


@pytest.mark.long
def test_every_sync_is_needed(
    write_project: Callable[[Path], Path], complete: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    """Each sync in turn does nothing, in all commands: then some failure of one does damage."""
    trials = []
    for name in CUT_OFF:
        (tmp_path / name).mkdir()
        start = crash.begun(name, write_project, complete, tmp_path / name / "start")
        trials.append(Trial(name, start, tmp_path / name))
    places = {operation.sync for trial in trials for operation in trial.operations if operation.sync}
    tally = new_tally("a sync removed: damage found", "all commands", len(places))
    unneeded = []
    for place in sorted(places):
        found = (
            (trial.name, wrong)
            for trial in trials
            if (wrong := lost_without(place, trial) or damage_without(place, trial))
        )
        name, wrong = next(found, ("", ""))
        print(f"without {place}: {name}: {wrong}", flush=True)
        with suppress(StopIteration), tally.trial():
            if not wrong:
                unneeded.append(place)
                raise StopIteration
    assert unneeded == []


def lost_before(operation: crash.Operation, disk: Disk) -> list[str]:
    """What is lost though it was committed before its own thread begins something new."""
    if operation.kind != "write":
        return []
    return [path for path in disk.lost() if is_of_checkpoint(path) == is_of_checkpoint(operation.path)]


def is_of_checkpoint(path: str) -> bool:
    """Whether the thread that writes beside the main one has to do with it."""
    return any(part.partition("-")[0] == "checkpoint" for part in Path(path).parts)


def lost_without(place: str, trial: Trial) -> str | None:
    """What is lost though it was committed before something new was begun, when `place` syncs nothing."""
    disk = Disk(trial.start)
    for number, operation in enumerate(trial.operations, 1):
        if lost := lost_before(operation, disk):
            return f"{lost[0]} is lost at operation {number}"
        if operation.sync != place:
            disk.apply(operation)
    return f"{lost[0]} is lost at the end" if (lost := disk.lost()) else None


def damage_without(place: str, trial: Trial) -> str | None:
    """The first damage when `place` syncs nothing: tried after what shows until another makes up for it."""
    disk = Disk(trial.start)
    missed: set[str] = set()
    for number, operation in enumerate(trial.operations, 1):
        if operation.sync == place:
            missed.add(operation.path)
            skipped = True
        else:
            disk.apply(operation)
            skipped = False
        shows = missed and (operation.sync or operation.kind == "rename")
        last = number == len(trial.operations)
        if (shows or last) and (wrong := trial.wrong_after(disk, number)):
            return f"operation {number}: {wrong}"
        if operation.kind == "fsync_folder" and not skipped:
            missed.discard(operation.path)
    return None
