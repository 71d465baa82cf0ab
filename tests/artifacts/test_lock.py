"""Who works on a run: by the kernel's lock on one machine, by the lease beside it on several."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.faults import crash

from grpo.artifacts import lease, lock
from grpo.artifacts.lease import LAPSE_S, STOP_S, Clock, Holder
from grpo.artifacts.run import Run
from grpo.console import Console
from grpo.errors import CorruptError, LockedError, ResourceError

ELSEWHERE = Holder("node2", 7, "2026-01-01T00:00:00+00:00", "abc", "another kernel")


class Time:
    """A clock that goes on where somebody waits, by as much; `meanwhile` happens then."""

    def __init__(self) -> None:
        self.now, self.waited = 1000.0, 0.0
        self.meanwhile: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waited += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr(lease, "CLOCK", Clock(lambda: found.now, found.sleep))
    return found


def held(folder: Path) -> Any:
    return json.loads((folder / lock.LEASE).read_text())


def leave(folder: Path, holder: Holder) -> None:
    """What a command that was killed leaves."""
    (folder / lock.LEASE).write_bytes(holder.encode())


def take(folder: Path, say: Callable[[str], None] = lambda line: None) -> Any:
    return lock.lock(folder, say, lambda: None)


def test_it_is_there_while_a_command_works_and_names_it(tmp_path: Path) -> None:
    with take(tmp_path) as found:
        note = held(tmp_path)
        assert (note["pid"], note["beat"], note["epoch"]) == (os.getpid(), 0, found.held.epoch)
        found.renew()
        assert held(tmp_path) == {**note, "beat": 1}
        found.check()
    assert not (tmp_path / lock.LEASE).exists()
    with pytest.raises(ZeroDivisionError), take(tmp_path):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_on_one_machine_that_of_a_killed_command_delays_nobody(tmp_path: Path, clock: Time) -> None:
    leave(tmp_path, Holder("here", 7, "", "killed", lease.this_kernel()))
    said: list[str] = []
    with take(tmp_path, said.append) as found:
        assert held(tmp_path)["epoch"] == found.held.epoch != "killed"
    assert (clock.waited, said) == (0, [])


def test_that_of_another_machine_is_taken_over_where_it_is_not_renewed(tmp_path: Path, clock: Time) -> None:
    leave(tmp_path, ELSEWHERE)
    said: list[str] = []
    with take(tmp_path, said.append):
        assert held(tmp_path)["pid"] == os.getpid()
    who = "pid 7 on node2 since 2026-01-01T00:00:00+00:00"
    assert said == [f"{tmp_path}: in use by {who}; taken over if it is not renewed for 60 s"]
    assert LAPSE_S <= clock.waited <= LAPSE_S + 4


def test_that_of_another_machine_is_respected_where_it_is_renewed(tmp_path: Path, clock: Time) -> None:
    leave(tmp_path, ELSEWHERE)
    clock.meanwhile = lambda: leave(tmp_path, Holder(**{**held(tmp_path), "beat": 1}))
    with pytest.raises(LockedError) as raised, take(tmp_path):
        pass
    who = "pid 7 on node2 since 2026-01-01T00:00:00+00:00"
    assert str(raised.value) == f"{tmp_path}: in use by {who}; wait for it, or stop it"
    assert clock.waited < LAPSE_S / 10
    assert held(tmp_path)["pid"] == 7


def test_one_that_ends_meanwhile_is_not_waited_for(tmp_path: Path, clock: Time) -> None:
    leave(tmp_path, ELSEWHERE)
    clock.meanwhile = lambda: (tmp_path / lock.LEASE).unlink(missing_ok=True) if clock.waited == 2 else None
    with take(tmp_path):
        assert held(tmp_path)["pid"] == os.getpid()
    assert clock.waited < 10


def test_of_two_that_take_over_at_once_one_has_it(tmp_path: Path, clock: Time) -> None:
    leave(tmp_path, ELSEWHERE)
    other = Holder("node3", 8, "then", "def", "a third kernel")

    def behind_its_own_writing() -> None:
        if clock.waited > LAPSE_S:
            leave(tmp_path, other)

    clock.meanwhile = behind_its_own_writing
    with pytest.raises(LockedError, match="taken over by pid 8 on node3 since then; this command has stopp"):
        take(tmp_path).__enter__()
    assert held(tmp_path)["pid"] == 8


def test_a_holder_that_was_suspended_goes_on_where_nobody_has_taken_over(tmp_path: Path, clock: Time) -> None:
    with take(tmp_path) as found:
        clock.now += 3600
        found.check()
        assert held(tmp_path)["beat"] == 1  # renewed first: others see that it is back
        clock.now += STOP_S - 1
        found.check()
        assert held(tmp_path)["beat"] == 1


@pytest.mark.parametrize("later", [0, 3600])
def test_a_zombie_is_told_who_has_taken_over(tmp_path: Path, clock: Time, later: float) -> None:
    with take(tmp_path) as found:
        leave(tmp_path, ELSEWHERE)
        clock.now += later
        with pytest.raises(LockedError) as raised:
            found.check()
        assert raised.value.exit_code == 5
        with pytest.raises(LockedError):
            found.renew()
        who = "pid 7 on node2 since 2026-01-01T00:00:00+00:00"
        way = "this command has stopped, and what it had committed stays"
        assert str(raised.value) == f"{tmp_path}: taken over by {who}; {way}"
    assert held(tmp_path)["pid"] == 7  # its end is no end of the other
    (tmp_path / lock.LEASE).unlink()
    with pytest.raises(LockedError, match="taken over by another command, which has ended; this command"):
        found.check()


@pytest.mark.parametrize("failed", [FileNotFoundError(2, "No such file", "part"), CorruptError("part: gone")])
def test_a_zombie_is_told_so_whatever_it_finds_missing(tmp_path: Path, failed: Exception) -> None:
    def end(name: str, meanwhile: Callable[[Path], object]) -> None:
        run = Run(tmp_path, name)
        with run.lock(Console()):
            meanwhile(run.path)
            raise failed

    with pytest.raises(type(failed)) as same:
        end("its own", lambda folder: None)
    assert same.value is failed
    with pytest.raises(LockedError, match="taken over by pid 7 on node2"):
        end("taken", lambda folder: leave(folder, ELSEWHERE))
    with pytest.raises(type(failed)) as same:  # of what is no lease nothing is known
        end("damaged", lambda folder: (folder / lock.LEASE).write_text("[]"))
    assert same.value is failed


def test_one_that_cannot_be_renewed_is_said_at_the_next_commit(tmp_path: Path, clock: Time) -> None:
    with take(tmp_path) as found:
        (tmp_path / f"{lock.LEASE}.tmp").mkdir()  # stands where the next version is written
        clock.now += STOP_S - 1
        found.check()
        clock.now += 1
        with pytest.raises(ResourceError, match=r"\.lease\.json: Is a directory"):
            found.check()
        (tmp_path / f"{lock.LEASE}.tmp").rmdir()
        found.check()


def test_what_a_loss_of_power_left_empty_is_nobodys_and_other_things_are_no_lease(
    tmp_path: Path, clock: Time
) -> None:
    (tmp_path / lock.LEASE).touch()
    with take(tmp_path):
        assert held(tmp_path)["pid"] == os.getpid()
    assert clock.waited == 0
    (tmp_path / lock.LEASE).write_text("[]")
    with pytest.raises(CorruptError, match="not a lease; remove it if no command is at work there"):
        take(tmp_path).__enter__()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_said(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(ResourceError, match=r"\.lock: no locks on this file system \(.*\); mount it with"):
        take(tmp_path).__enter__()


def test_it_is_renewed_by_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    with take(tmp_path):
        until = time.monotonic() + 10
        while held(tmp_path)["beat"] < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# Another machine: its kernel has another name, and its locks are its own. Seconds are short.
MACHINE = """
import sys
from grpo.artifacts import lease
from grpo.cli import main
kernel = sys.argv[1]
lease.this_kernel = lambda: kernel
lease.RENEW_S, lease.STOP_S, lease.LAPSE_S, lease._LOOK_S = 0.3, 1.2, 2, 0.2
sys.argv = ["grpo", *sys.argv[2:]]
main()
"""
SLOW = """
import time
def code(prompts, completions, **columns):
    time.sleep(0.5)
    return [float(len(text)) for text in completions]
"""


def grpo_on(kernel: str, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MACHINE, kernel, *command], stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_run_is_taken_over_by_another_machine_and_the_zombie_commits_nothing(project: Path) -> None:
    Path("reward.py").write_text(SLOW)
    zombie = grpo_on("one", "run")
    while not list(crash.RUN.rglob("part-00000*.sidecar.json")):
        assert zombie.poll() is None
        time.sleep(0.01)
    zombie.send_signal(signal.SIGSTOP)
    (crash.RUN / ".lock").unlink()  # so that the other one's is its own
    other = grpo_on("two", "run", "--until", "1")
    _, err = other.communicate(timeout=120)
    assert other.returncode == 0, err
    assert f"artifacts/tiny: in use by pid {zombie.pid} on " in err
    assert "taken over if it is not renewed for 2 s" in err
    found = crash.committed(project)
    zombie.send_signal(signal.SIGCONT)
    _, err = zombie.communicate(timeout=60)
    assert zombie.returncode == 5, err
    assert "artifacts/tiny: taken over by another command, which has ended; this command has" in err
    assert crash.committed(project) == found  # the very files
    for command in (["verify"], ["run"], ["verify"]):
        last = grpo_on("two", *command)
        _, err = last.communicate(timeout=120)
        assert last.returncode == 0, err
