"""A pool of workers that die, raise and are slow; and processes that end with their driver."""

import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from grpo.errors import DataError, EngineError, ResourceError
from grpo.execute import LocalProcesses, Pool, WorkerDied
from grpo.execute import pool as pool_module
from grpo.execute.processes import Process


def squares() -> Callable[[Any], Any]:
    """A worker's opening: its jobs are numbers, or what is to go wrong."""

    def work(job: Any) -> Any:
        match job:
            case int():
                return job * job, os.getpid()
            case "raise":
                raise DataError("a bad shard")
            case "bug":
                raise KeyError("x")
            case str() if job.startswith("slow"):
                time.sleep(0.5)
                return job, os.getpid()
            case "raises once" | "bug once" as what, Path() as marker:
                try:
                    marker.touch(exist_ok=False)
                except FileExistsError:
                    return "second", os.getpid()
                time.sleep(4)
                raise DataError("gone") if what == "raises once" else KeyError("gone")
            case "sleeps once", Path() as marker:
                with suppress(FileExistsError):
                    marker.touch(exist_ok=False)
                    time.sleep(600)
                return "second", os.getpid()
            case "sleep":
                time.sleep(600)
            case Path():  # dies the first time
                with suppress(FileExistsError):
                    job.touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
                return "second", os.getpid()
        return os.kill(os.getpid(), signal.SIGKILL)

    return work


def never() -> Callable[[Any], Any]:
    """One that cannot be opened."""
    os._exit(3)


@pytest.fixture
def pool() -> Iterator[Pool]:
    with closing(Pool(LocalProcesses(squares), 2)) as opened:
        yield opened


def go_on() -> None:
    """Nobody asks to stop."""


def test_each_job_is_done_once_by_one_of_two(pool: Pool) -> None:
    jobs = {str(number): number for number in range(9)}
    found = dict(pool.run(jobs, "test", go_on))
    assert {name: result[0] for name, result in found.items()} == {str(n): n * n for n in range(9)}
    first = {result[1] for result in found.values()}
    assert len(first) == 2
    assert {result[1] for _, result in pool.run(jobs, "test", go_on)} == first  # they stay


def test_what_a_dead_worker_did_another_does(pool: Pool, tmp_path: Path) -> None:
    jobs = {"dies": tmp_path / "marker", **{str(number): number for number in range(4)}}
    found = dict(pool.run(jobs, "test", go_on))
    assert set(found) == set(jobs)
    assert found["dies"][0] == "second"


def test_a_job_that_ends_every_worker_is_set_aside_and_named(pool: Pool) -> None:
    found = {}
    jobs: dict[str, Any] = {str(number): number for number in range(4)} | {"poison": "kill"}
    results = pool.run(jobs, "generate 3", go_on)
    for _ in range(4):
        name, result = next(results)
        found[name] = result[0]
    with pytest.raises(EngineError, match=r"generate 3: poison \(by SIGKILL\) ended 3 workers"):
        next(results)
    assert found == {str(number): number**2 for number in range(4)}
    assert dict(pool.run({"2": 2}, "test", go_on))["2"][0] == 4


def test_workers_that_never_open_end_it_soon() -> None:
    with closing(Pool(LocalProcesses(never), 1)) as opened:
        jobs = {str(number): number for number in range(50)}
        with pytest.raises(EngineError, match=r"0 \(with exit status 3\) ended 3 workers"):
            dict(opened.run(jobs, "test", go_on))


@pytest.mark.parametrize(
    ("job", "error", "text"), [("raise", DataError, "a bad"), ("bug", RuntimeError, "x")]
)
def test_what_a_job_raises_is_raised_here_and_not_tried_again(
    pool: Pool, job: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        dict(pool.run({"one": job}, "test", go_on))
    assert dict(pool.run({"2": 2}, "test", go_on))["2"][0] == 4


def test_a_job_that_takes_long_is_begun_again_and_the_first_answer_counts(pool: Pool, tmp_path: Path) -> None:
    """The first to have it sleeps for ten minutes; it is ended with the pool, not waited for."""
    assert len(dict(pool.run({"1": 1, "2": 2}, "test", go_on))) == 2  # both are open
    jobs: dict[str, Any] = {"late": ("sleeps once", tmp_path / "marker"), "2": 2, "3": 3}
    found = dict(pool.run(jobs, "test", go_on))
    assert found["late"][0] == "second"
    assert dict(pool.run({"2": 2, "3": 3}, "test", go_on))["3"][0] == 9  # by the one that is left


@pytest.mark.parametrize("what", ["raises once", "bug once"])
def test_what_nobody_waits_for_any_more_raises_nothing(tmp_path: Path, what: str) -> None:
    """A copy was faster, and the round is over; the slow one finds that what it reads is gone."""
    with closing(Pool(LocalProcesses(squares), 2)) as opened:
        assert len(dict(opened.run({"1": 1, "2": 2}, "test", go_on))) == 2
        late = (what, tmp_path / "marker")
        assert dict(opened.run({"late": late, "2": 2}, "test", go_on))["late"][0] == "second"
        jobs = {str(number): f"slow {number}" for number in range(8)}
        assert {name: found[0] for name, found in opened.run(jobs, "test", go_on)} == jobs


def test_a_worker_that_dies_within_its_answer_has_died() -> None:
    process = Process(squares)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.answers.close()
    process.answers, theirs = Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 1000) + b"half")  # as Connection.send() begins
    theirs.close()
    with pytest.raises(WorkerDied, match="by SIGKILL"):
        process.result()
    process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_of_the_whole_group_ends_no_worker(
    pool: Pool, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "SLOW", math.inf)
    pids = {pid for _, pid in dict(pool.run({"2": 2, "3": 3}, "test", go_on)).values()}
    jobs = {str(number): f"slow {number}" for number in range(4)}
    found = dict[str, Any]()
    for name, result in pool.run(jobs, "test", go_on):
        for pid in pids if not found else ():
            os.kill(pid, number)
        found[name] = result
    assert {pid for _, pid in found.values()} == pids


def test_once_it_stops_what_is_under_way_is_finished(pool: Pool) -> None:
    begun: list[str] = []
    jobs = {str(number): f"slow {number}" for number in range(12)}
    for name, _ in pool.run(jobs, "test", go_on, lambda: bool(begun)):
        begun.append(name)
    assert 1 <= len(begun) <= 3  # of two workers


def test_a_worker_that_does_not_answer_in_time_is_ended(tmp_path: Path) -> None:
    with closing(Pool(LocalProcesses(squares), 2, copies=False, timeout_s=3.0)) as opened:
        job = ("sleeps once", tmp_path / "marker")
        assert dict(opened.run({"late": job}, "test", go_on))["late"][0] == "second"
        with pytest.raises(EngineError, match=r"hangs \(no answer in 3 s\) ended 3 workers"):
            dict(opened.run({"hangs": "sleep", "2": 2}, "test", go_on))


def test_a_stop_ends_what_is_busy(pool: Pool) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dict(pool.run({"one": "sleep"}, "test", stop))
    assert dict(pool.run({"2": 2}, "test", go_on))["2"][0] == 4


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from grpo.execute import LocalProcesses, Pool
from tests.execute.test_pool import squares

if __name__ == "__main__":
    pool = Pool(LocalProcesses(squares), 1)
    for _, (_, pid) in pool.run({{"2": 2}}, "test", lambda: None):
        print(pid, flush=True)
    dict(pool.run({{"one": "sleep"}}, "test", lambda: None))
"""


def test_a_worker_ends_with_its_driver_busy_or_not(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(tests=str(Path(__file__).parents[2])))
    driver = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    driver.kill()
    driver.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {pid} is still there")


def test_a_large_job_does_not_wait_until_the_process_is_up() -> None:
    """A pipe holds 64 KiB or so; the process has a second to import before it reads."""
    process = Process(slow_to_open)
    try:
        process.submit("x" * 2**24)
        assert process._sending is not None
        assert process._sending.is_alive()  # nothing was waited for
        assert process.result() == 2**24
    finally:
        process.kill()


def test_a_large_job_that_nobody_reads_ends_with_its_worker() -> None:
    process = Process(never)
    process.submit("x" * 2**24)
    with pytest.raises(WorkerDied, match="with exit status 3"):
        process.result()
    process.kill()
    assert process._sending is not None
    assert not process._sending.is_alive()


def test_workers_that_take_their_time_to_end_are_ended_together() -> None:
    """Each would take the second that it is given."""
    opened = Pool(LocalProcesses(slow_to_close, grace_s=1.0), 4)
    assert len(dict(opened.run({str(n): n for n in range(4)}, "test", go_on))) == 4
    begun = time.monotonic()
    opened.close()
    assert time.monotonic() - begun < 3


def slow_to_open() -> Callable[[Any], Any]:
    """One whose job's length is its answer."""
    time.sleep(1)
    return len


class Slow:
    """What does not close."""

    def __call__(self, job: Any) -> Any:
        time.sleep(0.5)
        return job

    def close(self) -> None:
        time.sleep(60)


def slow_to_close() -> Callable[[Any], Any]:
    return Slow()


def test_all_that_are_idle_are_asked_together_and_end_together(pool: Pool) -> None:
    assert len(dict(pool.run({"1": "slow 1", "2": "slow 2"}, "test", go_on))) == 2
    before = set(pool.idle)
    assert [found[0] for found in pool.ask_all([3, 4])] == [9, 16]
    assert set(pool.idle) == before
    with pytest.raises(WorkerDied, match="by SIGKILL"):
        pool.ask_all([3, "kill"])
    assert pool.idle == ()
    assert dict(pool.run({"2": 2}, "test", go_on))["2"][0] == 4
    with pytest.raises(DataError, match="a bad shard"):
        pool.ask_all(["raise"])
    assert pool.idle == ()


def test_what_is_for_those_that_are_there_ends_with_the_last_of_them(pool: Pool, tmp_path: Path) -> None:
    assert len(dict(pool.run({"1": "slow 1", "2": "slow 2"}, "test", go_on))) == 2
    jobs: dict[str, Any] = {"dies": tmp_path / "marker", **{str(number): number for number in range(4)}}
    found = dict(pool.run(jobs, "test", go_on, may_start=False))
    assert found["dies"][0] == "second"  # by the other one
    assert len(pool.idle) == 1
    with pytest.raises(ResourceError, match="generate 3: all workers have ended that had what it needs"):
        dict(pool.run({"1": 1, "2": "kill"}, "generate 3", go_on, may_start=False))
