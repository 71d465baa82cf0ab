"""`grpo run` with engines on a Ray cluster: the files of a single process, whatever is killed."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo
from tests.execute.alone import MORE, alone, contents
from tests.execute.clusters import two_nodes

from grpo.execute import Pool, Worker

__all__ = ["alone"]  # a fixture

pytest.importorskip("ray")
import ray
import torch

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]
CPUS = torch.get_num_threads()  # of a node: what an engine takes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes(CPUS) as found:
        yield found


def on(address: str, count: int = 2) -> tuple[str, ...]:
    return "--set", f"execution={{backend: ray, address: '{address}', engines: {{count: {count}}}}}"


def test_the_files_are_those_of_one_process(
    alone: dict[str, str], project: Path, grpo: Grpo, cluster: Any
) -> None:
    """Policies are written below the run's folder, which is all that other machines see."""
    code, _, err = grpo("run", *MORE, *on(cluster.address))
    assert code == 0, err
    assert contents(project) == alone
    assert grpo("verify")[0] == 0


def test_an_actor_and_a_node_that_are_killed_change_nothing(
    alone: dict[str, str], project: Path, grpo: Grpo, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, killed = cluster.add_node(num_cpus=CPUS), list[str]()
    answer_of = Pool._answer_of

    def kill(pool: Pool, now: Any, worker: Worker, what: str) -> Any:
        """In the second iteration, while others work on their shards."""
        others: list[Any] = [*{*pool._busy} - {worker}] if what == "generate 1" else []
        if others and not killed:
            killed.append("actor")
            ray.kill(others[0]._actor)
        elif others and len(killed) == 1:
            killed.append("node")
            cluster.remove_node(lost, allow_graceful=False)
        return answer_of(pool, now, worker, what)

    monkeypatch.setattr(Pool, "_answer_of", kill)
    code, _, err = grpo("run", *MORE, *on(cluster.address, 3))
    assert code == 0, err
    assert killed == ["actor", "node"]
    assert contents(project) == alone
    assert grpo("verify")[0] == 0


def started(project: Path) -> subprocess.Popen[str]:
    """`grpo run` with a cluster of its own, as soon as a shard is committed."""
    command = [sys.executable, "-m", "grpo", "run", *MORE, *on("local", 1), "--set", "iterations=200"]
    driver = subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(project.glob("artifacts/tiny/iteration=000000/rollouts*/*.parquet")):
        assert driver.poll() is None, driver.stderr and driver.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.1)
    return driver


def of_sessions() -> dict[int, str]:
    """Processes of Ray by number, and how they were started; but for two that end a minute later."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        is_agent = "ray::DashboardAgent" in text or "ray::RuntimeEnvAgent" in text
        if ("ray::" in text or "/ray/" in text) and not is_agent:
            found[int(path.name)] = text
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_stays_behind_a_driver_that_is_ended(
    project: Path, grpo: Grpo, number: signal.Signals
) -> None:
    before = of_sessions().keys()
    driver = started(project)
    assert of_sessions().keys() - before
    driver.send_signal(number)
    code = driver.wait(60)
    assert code == (-9 if number == signal.SIGKILL else 128 + number)
    until = time.monotonic() + 60
    while left := {pid: text for pid, text in of_sessions().items() if pid not in before}:
        assert time.monotonic() < until, left
        time.sleep(0.2)
    assert grpo("verify")[0] == 0
    code, _, err = grpo("run", *MORE, "--until", "2")
    assert code == 0, err


def test_doctor_says_what_there_is_room_for(project: Path, grpo: Grpo, cluster: Any) -> None:
    def looked(count: int) -> dict[str, Any]:
        code, out, err = grpo("doctor", "--json", *on(cluster.address, count))
        assert code == 0, err
        [found] = [check for check in json.loads(out)["checks"] if check["name"] == "execution"]
        return dict(found)

    found = looked(2)
    assert (found["level"], found["needed"]) == ("ok", f"{CPUS} cores each")
    assert f"2 engines, ray on 2 nodes: {2 * CPUS} cores, 0 GPUs" in found["found"]
    found = looked(5)
    assert found["level"] == "warning"
    assert found["note"].startswith("there is room for 2 of 5 engines; ")


def test_what_cannot_be_is_refused(project: Path, grpo: Grpo) -> None:
    def error_of(execution: str, *more: str) -> tuple[int, str]:
        code, _, err = grpo("run", "--set", f"execution={execution}", *more)
        return code, err.strip().splitlines()[-1]

    code, err = error_of("{backend: ray, address: 'ray://head:10001'}")
    assert (code, "ray:// is a driver outside of the cluster" in err) == (2, True), err
    code, err = error_of("{engines: {gpus: 1}}")
    assert (code, "engines on GPUs are for `backend: ray`" in err) == (2, True), err
    code, err = error_of("{backend: ray, engines: {gpus: 1}}")
    assert (code, "needs generate.engine: vllm" in err) == (2, True), err
    code, err = error_of("{backend: ray, engines: {gpus: 1}}", "--dry-run")
    assert (code, "needs generate.engine: vllm" in err) == (2, True), err
    code, err = error_of("{address: 'head:6379'}")
    assert (code, "address: head:6379: of a Ray cluster; set backend: ray" in err) == (2, True), err
    code, err = error_of("{backend: ray, address: head}")
    assert code == 2, err
    code, err = error_of("{backend: ray, address: '127.0.0.1:1'}")
    assert (code, "`ray start --head` begins one" in err) == (7, True), err
