"""What computes elsewhere ends again and again: actors, nodes, drivers, the cluster's head, learner ranks.

Whatever happened, the run's files are those of one process, or of undisturbed ranks, and nothing of it stays.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import NewTally
from tests.execute.clusters import two_nodes
from tests.execute.test_pool import go_on, squares
from tests.faults import crash
from tests.faults.tally import extent

pytest.importorskip("ray")

from grpo.errors import EngineError
from grpo.execute import Pool
from grpo.execute.ray_actors import RayActors

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
OF_A_WORKER = extent("each fault of a worker elsewhere")
OF_A_MACHINE = extent("each fault of a node, a driver and a rank")
RUN = [
    *("run", "--set", "iterations=6", "--set", "checkpoints={every: 2, keep_last: null}"),
    *("--set", "generate.policy_lag=1", "--set", "generate.prompts_per_iteration=12"),
    *("--set", "generate.rollouts_per_shard=2"),
]
LIMIT_S = 300.0
PATIENCE_S = 8  # with a head that does not answer, in place of 30
GRPO = (
    f"from grpo.execute import ray_cluster; ray_cluster.HEAD_S = {PATIENCE_S}\n"
    "from grpo.cli import main; main()"
)
Strike = Callable[[Any, "subprocess.Popen[str]", random.Random], bool]


@pytest.fixture(scope="module")
def start(write_project: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("elsewhere") / "start")


@pytest.fixture(scope="module")
def alone(start: Path) -> dict[str, str]:
    """What the run holds that one process made."""
    whole = crash.copy(start, start.parent / "whole")
    crash.succeed(whole, *RUN)
    return crash.contents(whole)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A node that a test ends is replaced there: the next one finds two again."""
    with two_nodes(1) as found:
        yield found


def actors(cluster: Any) -> list[int]:
    """Processes of the cluster's nodes that have a worker of ours, by number."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name, _, rest = (path / "stat").read_text().rpartition(")")
            if "ray::_Answering" in name + (path / "cmdline").read_text() and int(rest.split()[1]) in raylets:
                found.append(int(path.name))
    return sorted(found)


def kill_an_actor(cluster: Any, driver: "subprocess.Popen[str]", chance: random.Random) -> bool:
    if not (found := actors(cluster)):
        return False
    with suppress(ProcessLookupError):
        os.kill(chance.choice(found), signal.SIGKILL)
    return True


def slow_an_actor(cluster: Any, driver: "subprocess.Popen[str]", chance: random.Random) -> bool:
    """It stands still for a while: another one tries the same shard."""
    if not (found := actors(cluster)):
        return False
    actor = chance.choice(found)
    with suppress(ProcessLookupError):
        os.kill(actor, signal.SIGSTOP)
        time.sleep(chance.uniform(0.2, 3.0))
        os.kill(actor, signal.SIGCONT)
    return True


def kill_a_node(cluster: Any, driver: "subprocess.Popen[str]", chance: random.Random) -> bool:
    """The one that the driver is not on; another one joins."""
    lost = next(node for node in cluster.list_all_nodes() if not node.head)
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    return True


def kill_the_driver(cluster: Any, driver: "subprocess.Popen[str]", chance: random.Random) -> bool:
    driver.kill()
    return True


# How many; seconds between two of them; how the command may end.
STRIKES: dict[str, tuple[Strike, int, tuple[float, float], tuple[int, ...]]] = {
    "SIGKILL of an actor": (kill_an_actor, OF_A_WORKER, (0.0, 6.0), (0, 8)),
    "SIGSTOP of an actor": (slow_an_actor, OF_A_WORKER, (0.0, 2.0), (0,)),
    "SIGKILL of a node": (kill_a_node, OF_A_MACHINE, (0.0, 8.0), (0, 7, 8)),
    "SIGKILL of the driver": (kill_the_driver, OF_A_MACHINE, (1.0, 15.0), (0, -signal.SIGKILL)),
}


@pytest.mark.parametrize("fault", STRIKES)
def test_the_run_has_the_files_of_one_process(
    fault: str, alone: dict[str, str], start: Path, tmp_path: Path, cluster: Any, new_tally: NewTally
) -> None:
    strike, tries, waits, ends = STRIKES[fault]
    chance, tally, tried = random.Random(fault), new_tally(fault, "run, 2 Ray nodes, in lanes"), 0
    while tried < tries:
        folder, codes = crash.copy(start, tmp_path / "run"), list[int]()
        before = tried
        while 0 not in codes:
            driver = begin(folder, cluster)
            while driver.poll() is None and tried < tries:
                with suppress(subprocess.TimeoutExpired):
                    driver.wait(chance.uniform(*waits))
                if driver.poll() is None:
                    tried += strike(cluster, driver, chance)
            _, err = driver.communicate(timeout=LIMIT_S)
            codes.append(driver.returncode)
            assert driver.returncode in ends, err
            assert "Traceback" not in err
        with tally.trial(tried - before):
            crash.succeed(folder, "verify")
            found = crash.contents(folder)
            assert found.items() >= alone.items()
            more = {name for name in found.keys() - alone.keys() if "/checkpoint/" not in name}
            assert not more  # the newest policy is written by a command that ends before the run does
            assert len(codes) > 1 or found == alone
            assert crash.leftovers(folder) == []
        nothing_stays(cluster)


def begin(folder: Path, cluster: Any, *more: str) -> "subprocess.Popen[str]":
    execution = f"execution={{backend: ray, address: '{cluster.address}', engines: {{count: 2}}}}"
    command = [sys.executable, "-c", GRPO, *RUN, "--set", execution, *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def nothing_stays(cluster: Any) -> None:
    until = time.monotonic() + 60
    while left := actors(cluster):
        assert time.monotonic() < until, left
        time.sleep(0.2)


def test_a_shard_that_ends_every_actor_is_set_aside(cluster: Any, new_tally: NewTally) -> None:
    """The others are done, each time."""
    tally = new_tally("a shard that ends three actors", "2 Ray nodes", OF_A_WORKER)
    with closing(Pool(RayActors(squares, cluster.address, 1, 0), 2)) as pool:
        for number in range(OF_A_WORKER):
            found = dict[str, Any]()
            jobs = {"poison": "kill", **{str(job): job for job in range(number, number + 4)}}
            with tally.trial():
                with pytest.raises(EngineError, match=r"poison \(its process ended\) ended 3 workers"):
                    found.update(pool.run(jobs, "test", go_on))
                assert {int(name): job for name, (job, _) in found.items()} == {
                    job: job * job for job in range(number, number + 4)
                }


@pytest.mark.parametrize("parts", [["gcs_server"], ["gcs_server", "raylet"]])
def test_a_head_that_is_gone_is_said(
    parts: list[str], alone: dict[str, str], start: Path, tmp_path: Path, new_tally: NewTally
) -> None:
    """The head alone, and its whole node; the run is then completed, with the same files."""
    tally, chance = new_tally(f"SIGKILL of the head's {' and '.join(parts)}", "run"), random.Random(0)
    for _ in range(OF_A_MACHINE):
        folder = crash.copy(start, tmp_path / "run")
        with tally.trial():
            with two_nodes(1) as cluster:
                driver = begin(folder, cluster, "--until", "1000", "--set", "iterations=1000")
                while not list(folder.glob("artifacts/tiny/iteration=*/rollouts*/*.parquet")):
                    assert driver.poll() is None, driver.communicate()
                    time.sleep(0.1)
                time.sleep(chance.uniform(0.0, 5.0))
                for part in parts:
                    cluster.head_node.all_processes[part][0].process.kill()
                _, err = driver.communicate(timeout=LIMIT_S)
                assert driver.returncode == 7, err
                assert "Traceback" not in err
                assert f"has not answered for {PATIENCE_S} s" in err.splitlines()[-1]
                nothing_stays(cluster)
            crash.succeed(folder, "verify")
            crash.succeed(folder, *RUN)
            assert alone.items() <= crash.contents(folder).items()
