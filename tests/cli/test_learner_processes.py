"""`execution.learner`: processes that `grpo` starts: the files of torchrun's, whoever is killed."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import forked
from tests.cli import test_ranks
from tests.conftest import Grpo, run_cli
from tests.faults import crash
from tests.faults.fates import RUN, SURROGATE

from grpo.pipeline.lane import SampleLane

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("parallel")]
LOST = f"update: rank 1 on {socket.gethostname()} ended, and the others cannot go on; nothing was committed"


def processes(count: int) -> list[str]:
    return ["--set", f"execution={{learner: {{processes: {count}}}}}"]


TWO = processes(2)


@pytest.fixture(scope="module")
def begun(write_project: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run is not begun."""
    folder = write_project(tmp_path_factory.mktemp("learner") / "project")
    (folder / "mine.py").write_text(SURROGATE)
    return folder


@pytest.fixture(scope="module")
def whole(begun: Path) -> Path:
    """The project after a run by two processes that nothing disturbed."""
    folder = crash.copy(begun, begun.parent / "whole")
    crash.succeed(folder, *RUN, *TWO)
    return folder


def ended(folder: Path, *command: str) -> tuple[int, list[str]]:
    """Exit code and lines of a command in a process of its own, which leaves none behind."""
    forked.begin()
    before = beside()
    code, _, err = crash.Child(folder, [list(command)]).wait()
    until = time.monotonic() + 20
    while left := beside() - before:
        assert time.monotonic() < until, left
        time.sleep(0.1)
    return code, err.splitlines()


def beside() -> set[int]:
    """Processes that were started as followers are, anywhere on this machine below this test's own."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            is_worker = b"multiprocessing.spawn" in command or b"multiprocessing.forkserver" in command
            session = (path / "stat").read_text().rpartition(")")[2].split()[3]
        except OSError:
            continue
        if is_worker and int(session) == os.getsid(0):
            found.add(int(path.name))
    return found


def first_step_of(folder: Path) -> dict[str, float]:
    query = "select loss, grad_norm from updates where iteration = 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, out, err = run_cli("sql", query, "--json")
    assert code == 0, err
    [found] = json.loads(out)
    return dict(found)


def test_the_files_are_those_of_torchrun(begun: Path, whole: Path) -> None:
    folder = crash.copy(begun, begun.parent / "torchrun")
    assert [code for code, _ in test_ranks.start(folder, *RUN)] == [0, 0]
    assert crash.contents(folder) == crash.contents(whole)


def test_three_processes_and_one_compute_the_same(begun: Path, whole: Path) -> None:
    three, one = (crash.copy(begun, begun.parent / name) for name in ("three", "one"))
    crash.succeed(three, *RUN, *processes(3), "--until", "1")
    crash.succeed(one, *RUN, "--until", "1")
    expected = first_step_of(one)
    assert abs(expected["loss"]) > 0.01
    for folder in (three, whole):
        assert first_step_of(folder) == pytest.approx(expected, rel=1e-5)


def test_who_is_killed_is_replaced_twice(begun: Path, whole: Path) -> None:
    folder = crash.copy(begun, begun.parent / "killed")
    fate = folder / "fate"
    fate.write_text("kill 1")
    code, lines = ended(folder, *RUN, *TWO)
    assert (code, lines[-1]) == (8, f"error: {LOST}")
    assert lines.count(f"{LOST}; all of them start again") == 2
    assert test_ranks.committed(folder) == []

    fate.write_text("once 1")
    code, lines = ended(folder, *RUN, *TWO)
    assert code == 0, lines
    assert lines.count(f"{LOST}; all of them start again") == 1
    assert crash.contents(folder) == crash.contents(whole)


def test_an_error_of_one_process_is_that_of_the_command(begun: Path, whole: Path) -> None:
    folder = crash.copy(begun, begun.parent / "failed")
    fate = folder / "fate"
    fate.write_text("nan 0")
    code, alone = ended(folder, *RUN, *processes(1))
    assert code == 8
    fate.write_text("nan 1")
    code, lines = ended(folder, *RUN, *TWO)
    said = "error: update.surrogate: mine:surrogate: returned nan or inf on rollouts"
    assert (code, lines[-1].startswith(said), alone[-1].startswith(said)) == (8, True, True), lines
    assert not [line for line in lines if "start again" in line]

    fate.write_text("stop")  # in the step of iteration 0, which is finished and committed
    code, lines = ended(folder, *RUN, *TWO)
    assert code == 143
    assert lines[-1].startswith("error: interrupted: what is committed is kept")
    fate.write_text("kill 0")
    assert ended(folder, *RUN, *TWO)[0] == -signal.SIGKILL
    fate.unlink()
    assert ended(folder, *RUN, *TWO)[0] == 0
    assert crash.contents(folder) == crash.contents(whole)


def in_fork(folder: Path, *command: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr. torch keeps what it computed as rank 0, even for forks of another rank."""
    return crash.Child(folder, [list(command)]).wait()


def test_policies_are_rebuilt_by_as_many(write_project: Callable[[Path], Path], tmp_path: Path) -> None:
    """Of five policies the third and the last are on disk; engines in other processes sample the fourth."""
    folder = write_project(tmp_path / "project")
    both = ["--set", "execution={engines: {count: 1}, learner: {processes: 2}}", "--set", "iterations=5"]
    run = ["run", *both, "--set", "generate.policy_lag=1", "--set", "checkpoints={every: 3}"]
    code, _, err = in_fork(folder, *run)
    assert code == 0, err
    code, out, err = in_fork(folder, "verify", "tiny", "--replay", *both)
    assert code == 0, err
    assert "replayed 5 of 5 updates from policy 0: 5 byte-equal" in out
    code, out, _ = in_fork(folder, "verify", "tiny", "--replay")
    assert code == 4
    assert "execution.learner.processes: 2 replays it, or torchrun with as many" in out
    (folder / "pipeline.yaml").write_text(
        (folder / "pipeline.yaml").read_text() + "execution: {learner: {processes: 2}}\n"
    )
    code, _, err = in_fork(folder, "export", "tiny", "--policy", "4", "--out", "four")
    assert code == 0, err
    assert (folder / "four" / "model.safetensors").exists()


def test_replicas_are_the_same_however_they_are_started_and_replayed_by_as_many(begun: Path) -> None:
    folder, other = (crash.copy(begun, begun.parent / name) for name in ("replicas", "replicas of torchrun"))
    four = ["--set", "execution={learner: {processes: 4, replicas: 2}}"]
    crash.succeed(folder, *RUN, *four, "--until", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "-m", "grpo"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRPO_REPLICAS": "2"}
    done = subprocess.run(
        [*torchrun, *RUN, "--until", "1"], cwd=other, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert crash.contents(other) == crash.contents(folder)
    verify = ["verify", "tiny", "--replay"]
    code, out, err = in_fork(folder, *verify, *four)
    assert code == 0, err
    assert "replayed 1 of 1 updates from policy 0: 1 byte-equal" in out
    code, out, _ = in_fork(folder, *verify, *processes(4))
    assert code == 4
    assert (
        "was made by 4 processes in 2 replicas, and a replay by 4 rounds otherwise;"
        " execution.learner: {processes: 4, replicas: 2} replays it" in out
    )


def test_who_is_found_missing_when_the_next_rollouts_begin_is_replaced(
    write_project: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines sample beside training, from weights that all processes of the learner have to give."""
    in_turn, folder = (write_project(tmp_path / name) for name in ("in turn", "project"))
    run = ["run", "--set", "generate.policy_lag=1", "--set", "iterations=3"]
    crash.succeed(in_turn, *run, *TWO)
    begin, killed = SampleLane._begin, tmp_path / "killed"

    def kill(lane: SampleLane, iteration: int) -> None:
        """Engine and learner, once there is a policy to be given."""
        if iteration == 2 and not killed.exists():
            found = multiprocessing.active_children()
            killed.write_text(str(len(found)))
            for child in found:
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
        begin(lane, iteration)

    monkeypatch.setattr(SampleLane, "_begin", kill)
    code, _, err = in_fork(folder, *run, "--set", "execution={engines: {count: 1}, learner: {processes: 2}}")
    assert code == 0, err
    assert int(killed.read_text()) >= 2  # what scores may be there too
    assert err.splitlines().count(f"{LOST}; all of them start again") == 1
    assert crash.contents(folder) == crash.contents(in_turn)


@pytest.mark.parametrize(
    ("execution", "more", "line"),
    [
        (
            "{learner: {processes: 2}}",
            ["update={weights: bfloat16_master, precision: bfloat16}"],
            "update.weights: bfloat16_master: several processes compute with parts of the float32 weights;",
        ),
        (
            "{learner: {processes: 2}}",
            ["generate.engine=vllm"],
            "generate.engine: vllm: has a process group of its own, beside which this process cannot train",
        ),
        ("{learner: {processes: 2, gpus: 1}}", [], "learner.gpus: says what Ray gives each"),
        (
            "{learner: {processes: 4, replicas: 3}}",
            [],
            "execution.learner: replicas: 3: 4 processes share out as many; right are 1, 2, 4",
        ),
        (
            "{backend: ray, learner: {processes: 2, gpus: 1}}",
            [],
            "gpus: 1, but this process, which trains with the others, has no GPU; 0 is right, or another",
        ),
        (
            "{learner: {processes: 2}, placement: shared}",
            [],
            "execution.placement: engine and learner take turns on a GPU in one process alone",
        ),
    ],
)
def test_what_they_cannot_do_is_refused(
    project: Path, grpo: Grpo, execution: str, more: list[str], line: str
) -> None:
    sets = [word for each in (f"execution={execution}", *more) for word in ("--set", each)]
    for command in (["run"], ["run", "--dry-run"]):
        code, _, err = grpo(*command, *sets)
        assert code == 2, err
        assert line in err.splitlines()[-1]
    assert not (project / "artifacts/tiny/iteration=000000").exists()


def test_what_needs_no_learner_starts_none(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo
) -> None:
    folder = crash.copy(complete, tmp_path / "complete")
    monkeypatch.chdir(folder)
    for stage in ("score", "generate"):
        code, _, err = grpo(stage, "--iteration", "1", "--force", *TWO)
        assert code == 0, err
        assert "learner:" not in err
