"""A checkpoint that one, two and three processes write: the same files, or none."""

import os
import shutil
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.update import groups
from tests.update.examples import all_logprobs, as_old, configuration, in_double, make_rollouts
from tests.update.runs import commit_rollouts, make_run, update

from grpo.artifacts import CHECKPOINT, OPTIMIZER, POLICY, ActiveRun, FileRecord, durable_policies, held_part
from grpo.artifacts.faults import VARIABLE
from grpo.config import Config
from grpo.errors import GrpoError
from grpo.update import parallel
from grpo.update.durable import Checkpoints
from grpo.update.learner import Learner
from grpo.update.parallel import Ranks

pytestmark = pytest.mark.xdist_group("parallel")
FILE_BYTES, NAME = 8192, "model.embed_tokens.weight"
# Of rank 1: every file is written, synced, renamed, and its folder synced.
KILLS = [
    f"kill {rank} {number}" for rank, number in ((1, 1), (1, 3), (1, 6), (1, 12), (0, 3), (0, 9), (0, 40))
]


def settings() -> Config:
    return configuration(learning_rate=0.01, kl_coefficient=0.0)


def opened(folder: Path, start: Path) -> ActiveRun:
    run = ActiveRun(folder, settings(), folder, _quiet())
    run.start = {"policy": start, "reference": start}
    return run


def _quiet() -> Any:
    from grpo.console import Console

    return Console(quiet=True)


def loaded(folder: Path, run: ActiveRun, ranks: Ranks | None) -> Learner:
    """A learner of policy 1, from where one process has put it."""
    learner = Learner(run.config.update, "cpu", ranks=ranks)
    learner.load(folder / "made" / POLICY, folder / "made" / OPTIMIZER, run.id_of("policy@1"))
    return learner


def records(run: ActiveRun) -> list[FileRecord]:
    manifest = run.manifest(CHECKPOINT, 0)
    assert manifest is not None
    return manifest.files


def write(folder: Path, run: ActiveRun, ranks: Ranks | None) -> list[FileRecord]:
    checkpoints = Checkpoints(run, FILE_BYTES)
    checkpoints.write(1, loaded(folder, run, ranks))
    checkpoints.flush()
    checkpoints.close()
    return records(run)


def fail(folder: Path, run: ActiveRun, ranks: Ranks) -> list[Any]:
    """A disk that is full for rank 1 alone, as it writes its second file; then one that is not."""
    checkpoints, learner = Checkpoints(run, FILE_BYTES), loaded(folder, run, ranks)
    checkpoints.write(1, learner)
    with pytest.raises(GrpoError) as error:
        checkpoints.flush()
    found = [str(error.value), error.value.exit_code, durable_policies(run)]
    checkpoints.write(1, learner)
    checkpoints.flush()
    return [*found, records(run)]


def as_process(rank: int, folder: Path, scene: str) -> None:
    """What rank 0 found to a file, of a process that is not killed."""
    kind, *details = scene.split()
    world = int(details[0]) if kind == "equal" else groups.WORLD
    if kind != "equal" and int(details[0]) == rank:
        os.environ[VARIABLE] = f"{kind}:{details[1]}"
    torch.set_num_threads(1)
    parallel._LAST_WORDS_S = 5.0
    ranks = Ranks(
        groups.store(folder, f"{scene} meeting", world), rank, world, patience=timedelta(seconds=60)
    )
    if rank > 0:
        try:
            ranks.follow()
        except GrpoError as error:
            sys.exit(error.exit_code)
        (folder / f"{scene}-{rank}").write_text(str(ranks.failure))
        ranks.leave()
        return
    run = opened(folder / scene, folder / "start")
    try:
        found: Any = (fail if kind == "ENOSPC" else write)(folder, run, ranks)
    except GrpoError as error:
        torch.save([str(error), durable_policies(run)], folder / f"{scene}.pt")
        sys.exit(error.exit_code)
    torch.save(found, folder / f"{scene}.pt")
    ranks.end(0, "")
    ranks.leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, untied: Path) -> Path:
    """Runs with an update, and no policy on disk but the first; `made` has the second, in one file each."""
    folder = tmp_path_factory.mktemp("rank_files")
    shutil.copytree(untied, folder / "start")
    run = make_run(folder / "one", settings(), folder / "start", folder / "start")
    rollouts = make_rollouts()
    commit_rollouts(
        run, 0, replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.1))
    )
    update(run, 0, Learner(run.config.update, "cpu"))
    shutil.move(run.folder(CHECKPOINT, 0), folder / "made")
    for scene in ("equal 2", "equal 3", "ENOSPC 1 6", *KILLS):
        shutil.copytree(folder / "one", folder / scene)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[FileRecord]:
    """Of the files that one process writes."""
    return write(folder, opened(folder / "one", folder / "start"), None)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def test_records_are_equal_in_worlds_of_1_2_and_3(folder: Path, alone: list[FileRecord]) -> None:
    for world in (2, 3):
        assert groups.start(as_process, folder, [f"equal {world}"], world) == [0] * world
        assert load(folder / f"equal {world}.pt") == alone
    # The model's tensors are 8 KiB at most: 13 files and an index; of moments twice as many, and more.
    names = [f"{record.part}/{record.name}" for record in alone]
    assert sum(name.startswith("policy/model-") for name in names) > 6
    assert sum(name.startswith("optimizer/optimizer-") for name in names) > 12
    assert "policy/model.safetensors.index.json" in names
    run = opened(folder / "equal 3", folder / "start")
    left = [path.name for path in (run.path / ".staging").rglob("*") if path.is_file()]
    assert left == []
    # Ordinary files of Hugging Face, and what the learner loads: the digest is checked.
    place, state = held_part(run, 1, POLICY), held_part(run, 1, OPTIMIZER)
    assert place is not None
    learner = Learner(run.config.update, "cpu")
    learner.load(place, state, run.id_of("policy@1"))
    assert torch.equal(
        in_double(place).get_input_embeddings().weight.float(), learner.model.get_parameter(NAME)
    )
    [first, again] = [run.require(CHECKPOINT, 0, "").summary["weights"], learner.digest()]
    assert first == again


def test_a_full_disk_of_one_is_exit_7_of_all_and_the_next_try_is_whole(
    folder: Path, alone: list[FileRecord]
) -> None:
    assert groups.start(as_process, folder, ["ENOSPC 1 6"]) == [0, 0]
    line, code, durable, after = load(folder / "ENOSPC 1 6.pt")
    assert code == 7
    assert "No space left on device" in line
    assert "MiB free on its disk" in line
    assert durable == [0]
    assert (folder / "ENOSPC 1 6-1").read_text() == line
    assert after == alone


@pytest.mark.parametrize("scene", KILLS)
def test_what_is_killed_as_it_writes_leaves_nothing_and_the_next_try_is_whole(
    folder: Path, alone: list[FileRecord], scene: str
) -> None:
    rank = int(scene.split()[1])
    codes = groups.start(as_process, folder, [scene])
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 8
    run = opened(folder / scene, folder / "start")
    assert durable_policies(run) == [0]
    if rank == 1:
        line, durable = load(folder / f"{scene}.pt")
        assert "rank 1 on " in line
        assert durable == [0]
    assert write(folder, run, None) == alone
    assert [path for path in (run.path / ".staging").rglob("*") if path.is_file()] == []
