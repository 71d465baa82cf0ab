"""Engines in processes of their own: the same files as in one process, killed workers included."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo
from tests.execute.alone import MORE, alone, contents

from grpo.execute import Pool, Worker
from grpo.execute.processes import Process

__all__ = ["alone"]  # a fixture

ENGINES = ("--set", "execution={engines: {count: 2}}")


def test_two_engines_give_the_same_files_as_one_process(
    alone: dict[str, str], project: Path, grpo: Grpo
) -> None:
    before = set(multiprocessing.active_children())
    code, _, err = grpo("run", *MORE, *ENGINES)
    assert code == 0, err
    assert contents(project) == alone
    assert set(multiprocessing.active_children()) <= before
    assert grpo("run", *MORE)[2].endswith("nothing to do\n")  # where it ran is in no fingerprint


def test_with_a_policy_behind_too(project: Path, grpo: Grpo) -> None:
    lag = ("--set", "generate.policy_lag=1", "--set", "iterations=3")
    assert grpo("run", *MORE, *lag)[0] == 0
    one = contents(project)
    (project / "artifacts").rename(project.parent / "alone")
    code, _, err = grpo("run", *MORE, *lag, *ENGINES)
    assert code == 0, err
    assert contents(project) == one


def test_a_killed_engine_costs_its_shard_alone(
    alone: dict[str, str], project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    answer_of = Pool._answer_of

    def kill_the_other(pool: Pool, now: Any, worker: Worker, what: str) -> Any:
        """As one of the two has answered."""
        for other in {*pool._busy} - {worker} if len(killed) < 3 else []:
            assert isinstance(other, Process)
            assert other.pid is not None
            os.kill(other.pid, signal.SIGKILL)
            killed.append(other.pid)
        return answer_of(pool, now, worker, what)

    monkeypatch.setattr(Pool, "_answer_of", kill_the_other)
    code, _, err = grpo("run", *MORE, *ENGINES)
    assert code == 0, err
    assert killed
    assert contents(project) == alone
    assert grpo("verify")[0] == 0


@pytest.mark.parametrize("stop", ["[]", '["0"]'])
def test_evaluations_are_sampled_by_them_too(measured_project: Path, grpo: Grpo, stop: str) -> None:
    """Of a policy whose folder is gone when the next shards of it are sampled; for stop texts it is read."""
    more = (*MORE, "--set", f"generate.stop={stop}")
    assert grpo("run", *more)[0] == 0
    one = contents(measured_project)
    (measured_project / "artifacts").rename(measured_project.parent / "alone")
    code, _, err = grpo("run", *more, *ENGINES)
    assert code == 0, err
    assert contents(measured_project) == one
