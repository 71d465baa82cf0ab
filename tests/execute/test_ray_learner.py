"""`grpo run` that trains by actors of one placement group: the files of as many processes of this machine."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo
from tests.execute.clusters import two_nodes
from tests.execute.test_pool import squares
from tests.execute.test_ray_run import of_sessions
from tests.faults import crash
from tests.faults.fates import RUN, SURROGATE

pytest.importorskip("ray")
import ray
import torch

from grpo.execute import ray_actors
from grpo.execute.ray_actors import RayActors
from grpo.update import stage as update
from grpo.update import world

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]
CPUS = torch.get_num_threads()  # of a process
# Two shards an iteration, sampled beside training.
AHEAD = (*RUN, "--set", "generate.policy_lag=1", "--set", "generate.rollouts_per_shard=9")
LOST = f"update: rank 1 on {socket.gethostname()} ended, and the others cannot go on; nothing was committed"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, each with room for an engine and a process of the learner."""
    with two_nodes(2 * CPUS) as found:
        yield found


@pytest.fixture(scope="module")
def begun(write_project: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_project(tmp_path_factory.mktemp("ray learner") / "project")
    (folder / "mine.py").write_text(SURROGATE)
    return folder


@pytest.fixture(scope="module")
def whole(begun: Path) -> dict[str, str]:
    """What a run by three processes of this machine holds, which does everything in turn."""
    folder = crash.copy(begun, begun.parent / "whole")
    crash.succeed(folder, *AHEAD, "--set", "execution={learner: {processes: 3}}")
    return crash.contents(folder)


@pytest.fixture
def folder(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = crash.copy(begun, tmp_path / "project")
    monkeypatch.chdir(found)
    return found


def on(address: str, processes: int = 3, engines: int = 2) -> tuple[str, ...]:
    return (
        "--set",
        f"execution={{backend: ray, address: '{address}', engines: {{count: {engines}}},"
        f" learner: {{processes: {processes}}}}}",
    )


def test_engines_and_learner_are_actors_whoever_is_killed(
    whole: dict[str, str], folder: Path, grpo: Grpo, cluster: Any
) -> None:
    (folder / "fate").write_text("once 1")
    code, _, err = grpo(*AHEAD, *on(cluster.address))
    assert code == 0, err
    assert err.splitlines().count(f"{LOST}; all of them start again") == 1
    assert crash.contents(folder) == whole
    assert grpo("verify")[0] == 0
    assert not ray.is_initialized()


def test_a_node_that_is_killed_costs_an_update(
    whole: dict[str, str], folder: Path, grpo: Grpo, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It joins when the engines have their places, and is where both processes fit."""
    nodes: list[Any] = []
    backend_of, read_kept = vars(world)["backend_of"], vars(update)["read_kept"]

    def begin(*given: Any, **more: Any) -> Any:
        if not nodes:
            nodes.append(cluster.add_node(num_cpus=2 * CPUS))
        return backend_of(*given, **more)

    def kill(*given: Any) -> Any:
        if len(nodes) == 1:
            nodes.append("killed")
            cluster.remove_node(nodes[0], allow_graceful=False)
        return read_kept(*given)

    monkeypatch.setattr(world, "backend_of", begin)
    monkeypatch.setattr(update, "read_kept", kill)
    code, _, err = grpo(*AHEAD, *on(cluster.address))
    assert code == 0, err
    assert nodes[1:] == ["killed"]
    assert "ended, and the others cannot go on; nothing was committed; all of them start again" in err
    assert crash.contents(folder) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_stays_behind_a_driver_that_is_ended(
    folder: Path, grpo: Grpo, number: signal.Signals
) -> None:
    before = of_sessions().keys()
    command = [*RUN, *on("local", processes=2, engines=1), "--set", "iterations=200"]
    driver = subprocess.Popen([sys.executable, "-m", "grpo", *command], cwd=folder, stderr=subprocess.PIPE)
    until = time.monotonic() + 180
    while not (folder / "artifacts/tiny/iteration=000000/update/manifest.json").exists():
        assert driver.poll() is None, driver.stderr and driver.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.1)
    assert len([text for text in of_sessions().values() if "ray::_Answering" in text]) >= 2
    driver.send_signal(number)
    assert driver.wait(120) == (-9 if number == signal.SIGKILL else 130)
    until = time.monotonic() + 60
    while left := {pid: text for pid, text in of_sessions().items() if pid not in before}:
        assert time.monotonic() < until, left
        time.sleep(0.2)
    assert grpo("verify")[0] == 0


def test_no_room_for_all_is_said(
    folder: Path, grpo: Grpo, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_actors, "START_S", 3)
    alone = f"execution={{backend: ray, address: '{cluster.address}', learner: {{processes: 6}}}}"
    code, _, err = grpo(*RUN, "--set", alone)
    assert code == 7
    assert (
        f"execution.learner: no node has had {CPUS} cpus to spare for 3 s for each of 5 processes beside this"
        in err.splitlines()[-1]
    )
    assert (folder / "artifacts/tiny/iteration=000000/advantages/manifest.json").exists()


def test_doctor_counts_engines_and_learner_together(folder: Path, grpo: Grpo, cluster: Any) -> None:
    def looked(processes: int) -> dict[str, Any]:
        code, out, err = grpo("doctor", "--json", *on(cluster.address, processes))
        assert code == 0, err
        checks = {check["name"]: check for check in json.loads(out)["checks"]}
        assert checks["execution"]["level"] == "ok"
        return dict(checks["execution.learner"])

    found = looked(3)
    assert (found["level"], found["needed"]) == ("ok", f"{CPUS} cores each")
    assert found["found"].startswith("2 processes of the learner beside engines, ray on 2 nodes: ")
    found = looked(4)
    assert found["level"] == "warning"
    assert found["note"] == (
        "there is room for 2 of 3 processes of the learner beside engines; a run waits for the rest, and ends"
        " (exit 7) without, or set execution.learner.processes: 3"
    )


def test_the_last_to_close_leaves_the_cluster(cluster: Any) -> None:
    """Whoever came first: engines go on where a learner is given up."""
    first = RayActors(squares, cluster.address, CPUS, 0, together=1)
    second = RayActors(squares, cluster.address, CPUS, 0)
    first.close()
    assert ray.is_initialized()
    second.close()
    assert not ray.is_initialized()
