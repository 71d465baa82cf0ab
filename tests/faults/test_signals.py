"""SIGINT, SIGTERM and SIGHUP: the work ends after the current shard; the second time, at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import NewTally
from tests.faults import crash
from tests.faults.tally import extent

pytestmark = pytest.mark.slow
TIMES = extent("SIGINT and SIGTERM, each")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
# Two seconds a rollout, as long as there is a file `slow`: the second signal finds a shard in the making.
SLOW = """\
import time
from pathlib import Path


def code(prompts, completions, **columns):
    time.sleep(2 if Path(__file__).with_name("slow").exists() else 0)
    return [float(sum(map(ord, text)) % 7) for text in completions]
"""


@pytest.mark.sampled
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_keeps_what_is_committed_and_the_same_command_goes_on(
    number: signal.Signals, write_project: Callable[[Path], Path], tmp_path: Path, new_tally: NewTally
) -> None:
    start = write_project(tmp_path / "start")
    whole = crash.copy(start, tmp_path / "whole")
    crash.succeed(whole, "run", "--until", "6")
    tally = new_tally(f"{number.name}, once", "run", TIMES)
    ended_early = 0
    for turn in range(TIMES):
        with tally.trial():
            folder = crash.copy(start, tmp_path / "stopped")
            child = crash.Child(folder, [["run", "--until", "6"]])
            wait_for_work(folder, child)
            time.sleep((turn + 0.5) / TIMES)
            os.kill(child.pid, number)
            code, _, err = child.wait()
            assert code in (0, CODES[number]), err
            ended_early += code != 0
            assert code == 0 or err.splitlines()[-1].startswith(
                "error: interrupted: what is committed is kept"
            )
            crash.succeed(folder, "run", "--until", "6")
            crash.succeed(folder, "verify")
            assert crash.contents(folder) == crash.contents(whole)
    assert ended_early > TIMES // 2


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_the_second_signal_ends_it_at_once(
    number: signal.Signals, write_project: Callable[[Path], Path], tmp_path: Path, new_tally: NewTally
) -> None:
    folder = write_project(tmp_path / "slow")
    (folder / "reward.py").write_text(SLOW)
    (folder / "slow").touch()
    tally = new_tally(f"{number.name}, twice", "run")
    with tally.trial():
        child = crash.Child(folder, [["run"]])
        wait_for_work(folder, child)
        while not list(folder.rglob("rewards-*")):
            time.sleep(0.01)
        os.kill(child.pid, number)
        time.sleep(1)  # two that come before Python looks are one
        os.kill(child.pid, number)
        code, _, err = child.wait()
        assert code == CODES[number], err
        assert err.splitlines()[-1].startswith("error: interrupted: what is committed is kept")
        assert not list(folder.rglob("rewards-*/*.parquet"))  # not after the shard
        (folder / "slow").unlink()
        crash.succeed(folder, "run", "--until", "1")
        crash.succeed(folder, "verify")


def wait_for_work(folder: Path, child: crash.Child) -> None:
    """Until the child has the lock: signals are then handled."""
    lock = folder / crash.RUN / ".lock"
    while f"pid {child.pid} on" not in (lock.read_text() if lock.exists() else ""):
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "times"),
    [*((number, 1) for number in CODES), (signal.SIGTERM, 100), (signal.SIGHUP, 100)],
)
def test_a_query_ends_at_once(finished: Path, number: signal.Signals, times: int) -> None:
    # A process of its own: DuckDB looks for signals in the thread that imported Python. What a
    # shell starts in the background ignores SIGINT, and so does what that starts, unless told.
    program = (
        "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from grpo.cli import main; main()"
    )
    query = "select count(*) from range(10000000000) a, range(1000) b"
    command = [sys.executable, "-c", program, "sql", query, "--timeout-s", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
            time.sleep(0.05)
        time.sleep(1)  # that is the query's, which is under way by now
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.002)  # also while Python ends
        out, err = process.communicate()
    assert (process.returncode, out) == (CODES[number], "")
    assert err.startswith("error: interrupted")
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_the_starter_model_is_not_trained_to_its_end(tmp_path: Path, number: signal.Signals) -> None:
    assert crash.in_child(tmp_path, ["init"])[0] == 0
    command = [sys.executable, "-m", "grpo", "run"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "step 20/200" in process.stderr.readline()
        process.send_signal(number)
        started = time.monotonic()
        said = process.stderr.read()
        assert (process.wait(), time.monotonic() - started < 5) == (CODES[number], True), said
    assert "step 100/" not in said
    assert [path.name for path in (tmp_path / "artifacts/.models").iterdir()] == [".tiny-arithmetic.lock"]
