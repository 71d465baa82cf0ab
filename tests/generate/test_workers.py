"""Engines in processes of their own: the same files as in one process, killed workers included."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.faults import crash

ENGINES = ("--set", "execution={engines: {count: 2}}")
MORE = ("--set", "generate.prompts_per_iteration=6", "--set", "generate.rollouts_per_shard=2")


def contents(folder: Path) -> dict[str, str]:
    """What a run holds, without its name."""
    return {name.partition("/")[2]: digest for name, digest in crash.contents(folder).items()}


@pytest.fixture
def alone(project: Path, grpo: Grpo) -> dict[str, str]:
    """Of the same run in one process; its folder is gone."""
    code, _, err = grpo("run", *MORE)
    assert code == 0, err
    found = contents(project)
    (project / "artifacts").rename(project.parent / "alone")
    return found


def test_two_engines_give_the_same_files_as_one_process(
    alone: dict[str, str], project: Path, grpo: Grpo
) -> None:
    code, _, err = grpo("run", *MORE, *ENGINES)
    assert code == 0, err
    assert contents(project) == alone
    assert multiprocessing.active_children() == []
    assert grpo("run", *MORE)[2].endswith("nothing to do\n")  # where it ran is in no fingerprint


def test_with_a_policy_behind_too(project: Path, grpo: Grpo) -> None:
    lag = ("--set", "generate.policy_lag=1", "--set", "iterations=3")
    assert grpo("run", *MORE, *lag)[0] == 0
    one = contents(project)
    (project / "artifacts").rename(project.parent / "alone")
    code, _, err = grpo("run", *MORE, *lag, *ENGINES)
    assert code == 0, err
    assert contents(project) == one


def test_a_killed_engine_costs_its_shard_alone(alone: dict[str, str], project: Path, grpo: Grpo) -> None:
    killed: list[int] = []

    def kill() -> None:
        """End the first worker that is there, in its opening or its work."""
        for _ in range(600):
            for child in multiprocessing.active_children():
                if child.pid is not None and not killed:
                    time.sleep(4)
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(child.pid)
                    return
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    code, _, err = grpo("run", *MORE, *ENGINES)
    killer.join()
    assert code == 0, err
    assert len(killed) == 1
    assert contents(project) == alone
    assert grpo("verify")[0] == 0


def test_evaluations_are_sampled_by_them_too(measured_project: Path, grpo: Grpo) -> None:
    assert grpo("run", *MORE)[0] == 0
    one = contents(measured_project)
    (measured_project / "artifacts").rename(measured_project.parent / "alone")
    code, _, err = grpo("run", *MORE, *ENGINES)
    assert code == 0, err
    assert contents(measured_project) == one
