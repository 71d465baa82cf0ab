"""The power fails: what was not synced is gone.

The operations of a command are recorded with the content they write, and replayed on a model of a disk. For
a failure after the n-th operation the disk is laid out in each of its states: with what is durable alone,
with all changes of folders, but the content of unsynced files lost, and with one of those changes. Then the
command goes on.
"""

import shutil
from pathlib import Path

import pytest
from tests.conftest import NewTally
from tests.faults import crash
from tests.faults.disk import Disk
from tests.faults.tally import chosen

pytestmark = pytest.mark.slow
SCENARIOS = ("run", "next", "from", "gc", "fork")


@pytest.fixture(params=SCENARIOS)
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

    def wrong_after(self, disk: Disk) -> str | None:
        """What is wrong after a failure now and the command again, in one of the states; None: nothing."""
        for changes in disk.states():
            contents = disk.contents(changes)
            state = hash(tuple(contents.items()))
            if state in self.held:
                continue
            lay_out(contents, self.folder / "failed")
            if wrong := self._wrong_now():
                return wrong
            self.held.add(state)
        return None

    def _wrong_now(self) -> str | None:
        folder = self.folder / "failed"
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
        if found != self.after and not (self.name == "from" and found == self.before):
            return "other contents"
        for name, inode in crash.committed(folder).items():
            if inode not in before.get(name, {inode}):  # committed before the failure
                return f"{name} was made again"
        for command in (["verify"], ["status"]):
            code, err = crash.in_child(folder, command)
            if code != 0:
                return f"{command[0]}: exit {code}: {err.splitlines()[-1]}"
        return None


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
    count = len(trial.operations)
    tally = new_tally("power loss (states)", trial.name)
    disk, tried = Disk(trial.start), chosen(count, 23)
    for number, operation in enumerate(trial.operations, 1):
        if operation.kind == "write":
            assert disk.lost() == [], number
        disk.apply(operation)
        if number in tried:
            before = len(trial.held)
            wrong = trial.wrong_after(disk)
            with tally.trial(len(trial.held) - before + (wrong is not None)):
                assert wrong is None, (number, operation)
    assert disk.lost() == []


@pytest.mark.long
def test_every_sync_is_needed(trial: Trial, new_tally: NewTally) -> None:
    """Each sync in turn does nothing: then some failure does damage."""
    places = sorted({operation.sync for operation in trial.operations if operation.sync})
    tally = new_tally("a sync removed: damage found", trial.name, len(places))
    for place in places:
        with tally.trial():
            wrong = lost_without(place, trial) or damage_without(place, trial)
            print(f"{trial.name}: without {place}: {wrong}", flush=True)
            assert wrong, place


def lost_without(place: str, trial: Trial) -> str | None:
    """What is lost though it was committed before something new was begun, when `place` syncs nothing."""
    disk = Disk(trial.start)
    for number, operation in enumerate(trial.operations, 1):
        if operation.kind == "write" and (lost := disk.lost()):
            return f"{lost[0]} is lost at operation {number}"
        if operation.sync != place:
            disk.apply(operation)
    return f"{lost[0]} is lost at the end" if (lost := disk.lost()) else None


def damage_without(place: str, trial: Trial) -> str | None:
    """The first damage when `place` syncs nothing: tried from there on to the next sync, and at the end."""
    disk = Disk(trial.start)
    missed = False
    for number, operation in enumerate(trial.operations, 1):
        if operation.sync == place:
            missed = True
            continue
        disk.apply(operation)
        if (missed or number == len(trial.operations)) and (wrong := trial.wrong_after(disk)):
            return f"operation {number}: {wrong}"
        missed = missed and not operation.kind.startswith("fsync_folder")
    return None
