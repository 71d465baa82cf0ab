"""Rewards that start what outlives them, stop themselves, flood the log, or are killed with their command."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.config import RewardConfig
from grpo.score.functions.call import GroupCall
from grpo.score.functions.pool import FunctionPool
from grpo.score.functions.workspace import MAX_OUTPUT, PREFIX
from grpo.score.outcome import Outcome

TIMEOUT_S = 2.0
REWARD = """\
import os, signal, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parent


def start_a_child():
    child = subprocess.Popen(["sleep", "3601"])
    (HERE / "child").write_text(str(child.pid))


def leaves_a_child(completions):
    start_a_child()
    return [1.0 for _ in completions]


def hangs_with_a_child(completions):
    start_a_child()
    time.sleep(600)


def waits_for_a_child(completions):
    subprocess.run(f"echo $$ > {HERE}/child; sleep 3601; true", shell=True)


def dies_with_a_child(completions):
    start_a_child()
    os.kill(os.getpid(), signal.SIGKILL)


def leaves_quietly(completions):
    start_a_child()
    os._exit(0)


def stops_itself(completions):
    start_a_child()
    os.kill(os.getpid(), signal.SIGSTOP)
    return [1.0 for _ in completions]


def stops_its_group(completions):
    start_a_child()
    os.killpg(0, signal.SIGSTOP)
    return [1.0 for _ in completions]


def floods(completions):
    for _ in range(20_000):
        sys.stdout.write("x" * 999 + "\\n")
    return [1.0 for _ in completions]


def one_endless_line(completions):
    for _ in range(200):
        os.write(1, b"y" * 100_000)
    return [1.0 for _ in completions]


def paints(completions):
    print("\\x1b[31mred\\x07 \\u202eback\\r", file=sys.stderr, flush=True)
    os.system("printf '\\\\033]0;title\\\\007\\\\377'")
    return [1.0 for _ in completions]
"""
ENDINGS = {
    "hangs_with_a_child": ("timeout", "no result within 2 s (in hangs_with_a_child, reward.py, line "),
    "waits_for_a_child": ("timeout", "no result within 2 s (in "),
    "dies_with_a_child": ("error", "the process ended during the call (SIGKILL"),
    "leaves_quietly": ("error", "the process ended during the call (exit status 0)"),
    "stops_itself": ("timeout", "no result within 2 s (its process was stopped)"),
    "stops_its_group": ("timeout", "no result within 2 s (its process was stopped)"),
}


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[FunctionPool]:
    (tmp_path / "reward.py").write_text(REWARD)
    pool = FunctionPool(tmp_path, num_workers=1)
    yield pool
    pool.close()


def score(pool: FunctionPool, function: str, **keys: Any) -> Outcome:
    reward = RewardConfig(function=f"reward:{function}", timeout_s=TIMEOUT_S, **keys)
    pool.check(reward)
    [[outcome]] = pool.score(reward, [GroupCall(["p"], ["a"], [[1]], {})])
    return outcome


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX"


def ends(pid: int) -> bool:
    for _ in range(100):
        if not is_running(pid):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("function", ENDINGS)
def test_it_ends_with_what_it_started_within_about_the_time_out(
    pool: FunctionPool, tmp_path: Path, function: str
) -> None:
    pool.check(RewardConfig(function=f"reward:{function}"))
    started = time.monotonic()
    outcome = score(pool, function)
    assert time.monotonic() - started < TIMEOUT_S + 8  # on a loaded machine; 35 s and more it was
    status, error = ENDINGS[function]
    assert outcome.status == status, outcome
    assert str(outcome.error).startswith(error)
    assert ends(int((tmp_path / "child").read_text()))
    assert score(pool, "floods").value == 1.0  # the next worker is there


def test_what_a_good_call_started_ends_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    pool = FunctionPool(tmp_path, num_workers=1)
    assert score(pool, "leaves_a_child").value == 1.0
    child = int((tmp_path / "child").read_text())
    assert is_running(child)
    pool.close()
    assert ends(child)


@pytest.mark.parametrize("function", ["floods", "one_endless_line"])
def test_what_is_printed_is_bounded(tmp_path: Path, function: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    pool = FunctionPool(tmp_path, num_workers=1)
    assert score(pool, function).value == 1.0
    pool.close()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert 0 < len(captured.err) < MAX_OUTPUT + 2000
    if function == "floods":
        last = f"a reward function prints more than {MAX_OUTPUT} characters; the rest is not shown"
        assert captured.err.splitlines()[-1] == last


def test_what_is_printed_paints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    pool = FunctionPool(tmp_path, num_workers=1)
    assert score(pool, "paints").value == 1.0
    pool.close()
    shown = capfd.readouterr().err
    assert "\\x1b[31mred\\x07 \\u202eback\n" in shown
    assert "\\x1b]0;title\\x07\ufffd" in shown
    assert all(c == "\n" or c.isprintable() for c in shown)


KILLED = """\
import os, signal, sys
from pathlib import Path
from grpo.score.functions.pool import FunctionPool
pool = FunctionPool(Path("."), 1)
print(pool._workspace.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_killed_command_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(victim)  # never followed
    (tmp_path / f"{PREFIX}foreign").mkdir()  # without a lock it is nobody's that we know
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    left = Path(done.stdout.strip())
    assert left.is_dir()
    first = FunctionPool(tmp_path, 1)
    assert not left.exists()
    second = FunctionPool(tmp_path, 1)  # the folder of a command that lives stays
    assert len(list(tmp_path.glob(f"{PREFIX}*"))) == 4
    first.close()
    second.close()
    assert sorted(path.name for path in tmp_path.glob(f"{PREFIX}*")) == [f"{PREFIX}foreign", f"{PREFIX}link"]
    assert (victim / "kept").exists()
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_worker_has_a_group_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("import os\ndef group(completions): return [os.getpgid(0)]\n")
    pool = FunctionPool(tmp_path, num_workers=1)
    assert score(pool, "group").value != os.getpgid(0)
    pool.close()
