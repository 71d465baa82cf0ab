"""Workers on a Ray cluster of two nodes, on this machine: actors, and a node, that are killed."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.execute.clusters import two_nodes
from tests.execute.test_pool import go_on, squares

from grpo.errors import DataError, EngineError, ResourceError, UsageError
from grpo.execute import Pool, node

pytest.importorskip("ray")
import ray

from grpo.execute import ray_actors
from grpo.execute.ray_actors import RayActors

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of a core each; the driver is on the first."""
    with two_nodes(1) as found:
        yield found


@pytest.fixture
def pool(cluster: Any) -> Iterator[Pool]:
    with closing(Pool(RayActors(squares, cluster.address, 1, 0), 2)) as opened:
        yield opened


def test_what_workers_do_on_a_cluster(pool: Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Answers, errors, deaths: as processes of this machine; and Ray says nothing of its own."""
    handler = signal.getsignal(signal.SIGTERM)
    jobs: dict[str, Any] = {str(number): number for number in range(9)}
    found = dict(pool.run(jobs, "test", go_on))
    assert {name: result[0] for name, result in found.items()} == {str(n): n * n for n in range(9)}
    slow = dict(pool.run({str(number): f"slow {number}" for number in range(16)}, "test", go_on))
    assert len({result[1] for result in slow.values()}) == 2
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not pool.is_one_machine  # a node may join at any time
    again = dict(pool.run({"dies": tmp_path / "marker", "2": 2}, "test", go_on))
    assert again["dies"][0] == "second"
    with pytest.raises(DataError, match="a bad shard"):
        dict(pool.run({"one": "raise"}, "test", go_on))
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        dict(pool.run({"one": "bug"}, "test", go_on))
    with pytest.raises(EngineError, match=r"poison \(its process ended\) ended 3 workers"):
        dict(pool.run({"poison": "kill", "2": 2}, "test", go_on))
    time.sleep(2)  # it would say so by then
    assert capfd.readouterr() == ("", "")


def test_a_node_that_is_killed_costs_its_jobs_alone(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = cluster.add_node(num_cpus=1)
    jobs = {str(number): f"slow {number}" for number in range(12)}
    again, redone = Pool._again, list[str]()

    def noted(pool: Pool, now: Any, name: str, how: str) -> None:
        redone.append(how)
        again(pool, now, name, how)

    monkeypatch.setattr(Pool, "_again", noted)
    with closing(Pool(RayActors(squares, cluster.address, 1, 0), 3)) as opened:
        found = {}
        for name, result in opened.run(jobs, "test", go_on):
            found[name] = result[0]
            if len(found) == 4:
                cluster.remove_node(lost, allow_graceful=False)
    assert found == jobs
    assert redone
    assert set(redone) <= {"its node died", "its process ended"}


def test_no_place_for_any_is_said(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actors, "START_S", 2)
    message = r"test: no node has had 64 cpus to spare for 2 s; what is committed is kept"
    with (
        closing(Pool(RayActors(squares, cluster.address, 64, 0), 2)) as opened,
        pytest.raises(ResourceError, match=message),
    ):
        dict(opened.run({"2": 2, "3": 3}, "test", go_on))


def test_no_cluster_is_said() -> None:
    with pytest.raises(
        ResourceError, match=r"^execution.address: 127.0.0.1:1: .*`ray start --head` begins one"
    ):
        RayActors(squares, "127.0.0.1:1", 1, 0)


def test_a_node_with_other_sources_is_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    others = node.facts() | {"torch": "2.0.0"}
    monkeypatch.setattr(ray_actors, "facts", lambda: others)
    with (
        closing(Pool(RayActors(squares, cluster.address, 1, 0), 1)) as opened,
        pytest.raises(
            UsageError, match=r"execution: \S+ has torch \S+, the driver 2.0.0; the same everywhere"
        ),
    ):
        dict(opened.run({"2": 2}, "test", go_on))


def test_a_node_without_this_package_is_named(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its workers find in place of the package cannot be imported, as where it is not installed."""
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'grpo'\")\n")
    started = ray_actors._remote_class().options
    elsewhere = {"env_vars": {"PYTHONPATH": str(tmp_path)}}

    def without(**options: Any) -> Any:
        return started(runtime_env=elsewhere, **options)

    monkeypatch.setattr(ray_actors._remote_class(), "options", without)
    with (
        closing(Pool(RayActors(squares, cluster.address, 1, 0), 1)) as opened,
        pytest.raises(UsageError, match=r"^execution: \S+ cannot import a worker .*No module named 'grpo'"),
    ):
        dict(opened.run({"2": 2}, "test", go_on))


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_full_cluster_is_remembered_until_something_is_free(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of a core each have room for two of three workers, which is found out once."""
    monkeypatch.setattr(ray_actors, "WAIT_S", 10)  # longer than an actor takes to start
    started, start = list[float](), RayActors.start

    def noted(self: RayActors) -> ray_actors.Actor:
        started.append(time.monotonic())
        return start(self)

    monkeypatch.setattr(RayActors, "start", noted)
    jobs = {str(number): f"slow {number}" for number in range(6)}
    with closing(Pool(RayActors(squares, cluster.address, 1, 0), 3, copies=False)) as opened:
        # A node that another test has killed has room, and ends what is there, until Ray finds it dead.
        wait_until(lambda: sum(each["Alive"] for each in ray.nodes()) == len(cluster.list_all_nodes()))
        # The third has the last job, which one of the two takes when it has waited.
        assert {name: found[0] for name, found in opened.run(jobs, "test", go_on)} == jobs
        assert len(started) == 3
        begun = time.monotonic()
        assert {name: found[0] for name, found in opened.run(jobs, "test", go_on)} == jobs
        assert (len(started), time.monotonic() - begun < 10) == (3, True)
        cluster.add_node(num_cpus=1)
        wait_until(lambda: bool(opened._backend.room(1)))  # Ray tells of it a moment later
        assert {name: found[0] for name, found in opened.run(jobs, "test", go_on)} == jobs
        assert len(started) == 4
