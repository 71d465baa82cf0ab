"""Rollouts sampled beside training: the bytes of doing it in turn, whatever ends the command."""

import math
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo, NewTally
from tests.faults import crash
from tests.faults.tally import extent

from grpo.errors import EngineError, Interrupted
from grpo.execute import Pool, pool
from grpo.update import stage as update

KILLS = extent("SIGKILL of a run in lanes")
AHEAD = [
    *(
        "--set",
        "generate.policy_lag=1",
        "--set",
        "iterations=4",
        "--set",
        "checkpoints={every: 2, keep_last: 1}",
    ),
    *("--set", "generate.prompts_per_iteration=6", "--set", "generate.rollouts_per_shard=2"),
]
ENGINES = ["--set", "execution={engines: {count: 2}}"]


@pytest.fixture(scope="module")
def in_turn(
    write_project: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What the same run holds in one process."""
    folder = write_project(tmp_path_factory.mktemp("lane") / "in turn")
    crash.succeed(folder, "run", *AHEAD)
    return crash.contents(folder)


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines take a while: longer than a stage of the tiny model."""
    answer_of = Pool._answer_of

    def later(pool: Pool, *given: Any) -> Any:
        time.sleep(0.2)
        return answer_of(pool, *given)

    monkeypatch.setattr(Pool, "_answer_of", later)


def is_sampling() -> bool:
    return any(thread.name == "hand-out" for thread in threading.enumerate())


def test_training_goes_on_while_the_next_rollouts_are_sampled(
    in_turn: dict[str, str], project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch)
    produce, beside = update.produce, list[bool]()

    def noted(*given: Any) -> Any:
        beside.append(is_sampling())
        return produce(*given)

    monkeypatch.setattr(update, "produce", noted)
    code, _, err = grpo("run", *AHEAD, *ENGINES)
    assert code == 0, err
    assert beside == [True, True, True, False]  # of iterations 0 to 3: behind the last nothing is sampled
    assert crash.contents(project) == in_turn
    assert grpo("verify")[0] == 0
    assert not list(project.glob("artifacts/tiny/.weights-*"))
    assert grpo("run", *AHEAD)[2].endswith("nothing to do\n")


def test_an_update_that_fails_ends_what_is_sampled_beside_it(
    in_turn: dict[str, str], project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(multiprocessing.active_children())

    def failing(*given: Any) -> Any:
        assert is_sampling()
        raise EngineError("update: it failed")

    with monkeypatch.context() as patched:
        slowly(patched)
        patched.setattr(update, "produce", failing)
        code, _, err = grpo("run", *AHEAD, *ENGINES)
    assert (code, err.strip().splitlines()[-1]) == (8, "error: update: it failed")
    assert not is_sampling()
    assert set(multiprocessing.active_children()) <= before
    assert grpo("run", *AHEAD, *ENGINES)[0] == 0
    assert crash.contents(project) == in_turn


def test_a_first_signal_loses_no_shard_that_is_under_way(
    in_turn: dict[str, str], project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update beside them ends at once, and both engines' shards of the next iteration are committed."""
    answer_of, signalled = Pool._answer_of, threading.Event()

    def held(pool: Pool, now: Any, worker: Any, what: str) -> Any:
        if what == "generate 1":
            assert signalled.wait(60)
        return answer_of(pool, now, worker, what)

    def interrupted(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        signalled.set()
        raise Interrupted(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(pool, "SLOW", math.inf)  # neither engine has a copy of the other's shard
        patched.setattr(Pool, "_answer_of", held)
        patched.setattr(update, "produce", interrupted)
        assert grpo("run", *AHEAD, *ENGINES)[0] == 130
    assert len([*project.glob("artifacts/tiny/.staging/iteration=000001/rollouts-*/*.sidecar.json")]) == 2
    assert grpo("run", *AHEAD, *ENGINES)[0] == 0
    assert crash.contents(project) == in_turn


def test_what_fails_in_the_lane_is_raised_when_its_rollouts_are_wanted(
    in_turn: dict[str, str], project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(multiprocessing.active_children())
    answer_of = Pool._answer_of

    def failing(pool: Pool, now: Any, worker: Any, what: str) -> Any:
        if what == "generate 2":
            raise EngineError("generate 2: it failed")
        return answer_of(pool, now, worker, what)

    with monkeypatch.context() as patched:
        patched.setattr(Pool, "_answer_of", failing)
        code, _, err = grpo("run", *AHEAD, *ENGINES)
    assert (code, err.strip().splitlines()[-1]) == (8, "error: generate 2: it failed")
    assert (project / "artifacts/tiny/iteration=000001/update/manifest.json").exists()
    assert set(multiprocessing.active_children()) <= before
    assert grpo("run", *AHEAD, *ENGINES)[0] == 0
    assert crash.contents(project) == in_turn


@pytest.mark.slow
@pytest.mark.sampled
def test_kills_at_random_times_change_nothing(
    in_turn: dict[str, str],
    write_project: Callable[[Path], Path],
    tmp_path: Path,
    new_tally: NewTally,
) -> None:
    """Of the driver: its engines end with it. Each run is killed twice, and then completed."""
    tally = new_tally("SIGKILL at a random time", "run, in lanes", KILLS)
    chance = random.Random(2)
    for number in range(0, KILLS, 2):
        folder = write_project(tmp_path / f"killed {number}")
        with tally.trial(2):
            for _ in range(2):
                child = crash.Child(folder, [["run", *AHEAD, *ENGINES]])
                time.sleep(chance.uniform(0.3, 3.0))
                child.kill()
                child.wait()
                if (folder / crash.RUN / "run.json").exists():
                    crash.succeed(folder, "verify")
            crash.succeed(folder, "run", *AHEAD, *ENGINES)
            assert crash.contents(folder) == in_turn
            assert not list(folder.glob("artifacts/tiny/.weights-*"))
            assert crash.leftovers(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_lanes(
    in_turn: dict[str, str],
    write_project: Callable[[Path], Path],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    folder = write_project(tmp_path / "signalled")
    for iteration in (0, 1):
        child = crash.Child(folder, [["run", *AHEAD, *ENGINES]])
        trained = folder / crash.RUN / f"iteration={iteration:06d}/update/manifest.json"
        while not trained.exists():  # the lane is at work then
            time.sleep(0.01)
        os.kill(child.pid, number)
        code, _, err = child.wait()
        assert code == 128 + number, err
        assert "Traceback" not in err
        assert "interrupted: what is committed is kept" in err
    crash.succeed(folder, "run", *AHEAD, *ENGINES)
    assert crash.contents(folder) == in_turn
