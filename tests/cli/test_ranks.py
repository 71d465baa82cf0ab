"""Commands on two processes, started as torchrun starts them: rank 0 is one, the other serves it."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.conftest import NewTally, run_cli
from tests.faults import crash
from tests.faults.fates import RUN, SAMPLED, SURROGATE, UPDATE
from tests.faults.tally import extent

from grpo.cli import ranks
from grpo.update import stage
from grpo.update.durable import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("parallel")]
WORLD = 2
KILLS = extent("each fault of a node, a driver and a rank")
Ends = list[tuple[int, str]]


def begin(folder: Path, *command: str, fault: str | None = None, of: int = 0) -> list[crash.Child]:
    """The processes, by rank. fault: what happens in that `of` one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(WORLD):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = own | meeting | {"OMP_NUM_THREADS": "1"}
        children.append(
            crash.Child(folder, [list(command)], fault if rank == of else None, environment=environment)
        )
    return children


def start(folder: Path, *command: str, fault: str | None = None, of: int = 0) -> Ends:
    """(exit code, last line on stderr) of each rank. fault, of: as begin() takes them."""
    ends = [child.wait() for child in begin(folder, *command, fault=fault, of=of)]
    return [(code, (err.splitlines() or [""])[-1]) for code, _, err in ends]


def committed(folder: Path) -> list[str]:
    return sorted(
        path.parent.name for path in (folder / "artifacts").glob("*/iteration=000001/update/manifest.json")
    )


@pytest.fixture(scope="module")
def project(write_project: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_project(tmp_path_factory.mktemp("ranks") / "project")
    (folder / "mine.py").write_text(SURROGATE)
    return folder


@pytest.fixture(scope="module")
def whole(project: Path) -> Path:
    """The project after a run that nothing disturbed."""
    folder = crash.copy(project, project.parent / "whole")
    assert [code for code, _ in start(folder, *RUN)] == [0, 0]
    return folder


def test_a_run_that_is_stopped_fails_and_is_killed_ends_as_if_none_had_been(
    project: Path, whole: Path
) -> None:
    folder = crash.copy(project, project.parent / "disturbed")
    fate = folder / "fate"

    fate.write_text("stop")  # in the step of iteration 0, which is finished and committed
    said = start(folder, *RUN)
    assert [code for code, _ in said] == [143, 143]
    assert said[0][1].startswith("error: interrupted: what is committed is kept")

    fate.write_text("nan 1")
    said = start(folder, *RUN)
    assert [code for code, _ in said] == [8, 8]
    assert said[0][1] == said[1][1]
    assert said[0][1].startswith("error: update.surrogate: mine:surrogate: returned nan or inf on rollouts")

    fate.write_text("kill 1")
    said = start(folder, *RUN)
    lost = f"error: update: rank 1 on {socket.gethostname()} ended, and the others cannot go on"
    assert said[0] == (8, f"{lost}; nothing was committed")
    assert said[1][0] == -signal.SIGKILL

    fate.write_text("kill 0")
    said = start(folder, *RUN)
    lost = f"error: update: rank 0 on {socket.gethostname()} ended, and the others cannot go on"
    assert said[0][0] == -signal.SIGKILL
    assert said[1] == (8, f"{lost}; nothing was committed")
    assert committed(folder) == []

    fate.unlink()
    assert [code for code, _ in start(folder, *RUN)] == [0, 0]
    assert crash.contents(folder) == crash.contents(whole)


def test_rank_0_killed_while_it_writes_and_policies_rebuilt_together(
    write_project: Callable[[Path], Path], tmp_path: Path
) -> None:
    # An adapter, whose base is the reference; of five policies the third and the last are on disk.
    lora = "update={objective: grpo, learning_rate: 0.01, lora: {rank: 2, alpha: 4}}"
    run = ["run", "--set", lora, *SAMPLED, "--set", "iterations=5", "--set", "checkpoints={every: 3}"]
    start_ = write_project(tmp_path / "project")
    undisturbed, folder = (crash.copy(start_, tmp_path / name) for name in ("undisturbed", "killed"))
    assert [code for code, _ in start(undisturbed, *run)] == [0, 0]
    assert [code for code, _ in start(folder, *run, fault="kill:1010")] == [-signal.SIGKILL, 8]
    held = [path.parent.name for path in (folder / "artifacts").glob("*/iteration=*/update")]
    assert sorted(held) == [
        f"iteration=00000{number}" for number in range(4)
    ]  # the fourth policy is in no file
    assert [code for code, _ in start(folder, *run)] == [0, 0]
    assert crash.contents(folder) == crash.contents(undisturbed)


def test_ranks_killed_at_random_times_change_nothing(
    project: Path, whole: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    """Either of them; the other one ends, at once, and commits nothing of what both were at."""
    chance, tally, tried = random.Random(0), new_tally("SIGKILL of a learner rank", "run"), 0
    while tried < KILLS:
        folder, ends, before = crash.copy(project, tmp_path / "killed"), [-1], tried
        while ends != [0, 0]:
            children = begin(folder, *RUN)
            if tried < KILLS:
                time.sleep(chance.uniform(0.5, 4.0))
                chance.choice(children).kill()
                tried += 1
            said = [child.wait() for child in children]
            ends = [code for code, _, _ in said]
            assert set(ends) <= {0, 8, -signal.SIGKILL}, said
            assert not any("Traceback" in err for _, _, err in said), said
        with tally.trial(tried - before):
            crash.succeed(folder, "verify")
            assert crash.contents(folder) == crash.contents(whole)
            assert crash.leftovers(folder) == []


def test_rank_1_killed_or_without_room_while_it_writes_its_files(
    write_project: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "Checkpoints", partial(Checkpoints, file_bytes=2**12))
    run = ["run", *SAMPLED, "--set", "iterations=3", "--set", "checkpoints={every: 1, keep_last: 1}"]
    start_ = write_project(tmp_path / "project")
    undisturbed, folder = (crash.copy(start_, tmp_path / name) for name in ("undisturbed", "killed"))
    assert [code for code, _ in start(undisturbed, *run)] == [0, 0]
    held = crash.contents(undisturbed)
    assert sum("/checkpoint/" in name for name in held) > 4
    # Of its first file, and of one of the next policy's: it changes nothing else on disk.
    for number in (2, 9):
        codes = [code for code, _ in start(folder, *run, fault=f"kill:{number}", of=1)]
        assert codes == [8, -signal.SIGKILL]
    said = start(folder, *run, fault="ENOSPC:3", of=1)
    assert [code for code, _ in said] == [7, 7]
    assert said[0][1] == said[1][1]
    assert "No space left on device" in said[0][1]
    assert [code for code, _ in start(folder, *run)] == [0, 0]
    assert crash.contents(folder) == held
    assert crash.leftovers(folder) == []


def test_torchrun_replays_what_it_made_and_one_process_refuses(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "grpo"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    verify = ["verify", "tiny", "--replay", *UPDATE]
    done = subprocess.run([*command, *verify], cwd=whole, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "replayed 2 of 2 updates from policy 0: 2 byte-equal" in done.stdout
    monkeypatch.chdir(whole)
    code, out, _ = run_cli(*verify)
    assert code == 4
    assert (
        "stopped  update 0: was made by 2 processes, and a replay by 1 rounds otherwise;"
        " execution.learner.processes: 2 replays it, or torchrun with as many" in out
    )


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["show"], "show: is for one process; torchrun starts several of run, update or verify"),
        (
            ["run", "--set", "update={weights: bfloat16_master, precision: bfloat16}"],
            "update.weights: bfloat16_master: several processes compute with parts of the float32 weights;"
            " set weights: float32, or start one process",
        ),
        (
            ["update", "--set", "update.optimizer=adamw_8bit"],
            "update.optimizer: adamw_8bit: its blocks of 8-bit values cannot be shared out; set optimizer:"
            " adamw, or start one process",
        ),
        (
            ["run", "--set", "execution={learner: {processes: 2}}"],
            "execution.learner.processes: 2: torchrun has started processes already; leave one of the two"
            " out",
        ),
        (
            ["run", "--set", "generate.engine=vllm"],
            "generate.engine: vllm: has a process group of its own, beside which none can train yet; set"
            " engine: transformers, or start one process",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], line: str
) -> None:
    monkeypatch.chdir(project)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not ranks.are_several()  # without MASTER_ADDR they are somebody else's
    monkeypatch.setattr(ranks, "are_several", lambda: True)
    monkeypatch.setattr(ranks, "serve", lambda: None)
    code, _, err = run_cli(*command)
    assert (code, err.splitlines()[-1]) == (2, f"error: {line}")
    assert not (project / "artifacts").exists()
