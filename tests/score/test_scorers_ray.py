"""Reward functions in scorers on a Ray cluster of two nodes: the files of one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.execute.clusters import two_nodes
from tests.score.test_score_stage import failed, reward, scored
from tests.score.test_scorers_elsewhere import ALL_KINDS, files_of, processes_of, project_in, wait_for_none_of

from grpo.errors import UsageError
from grpo.execute import Pool, Worker
from grpo.score.functions.modules import Modules

pytest.importorskip("ray")
import ray

from grpo.execute import ray_actors

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A core each: a scorer of one worker."""
    with two_nodes(1) as found:
        yield found


def on(cluster: Any) -> dict[str, Any]:
    return {"backend": "ray", "address": cluster.address, "scorers": {"count": 2}}


@pytest.mark.parametrize("apart", [False, True])
def test_rewards_are_those_of_one_process(
    tmp_path: Path,
    cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    apart: bool,
) -> None:
    """apart: as if the nodes were machines of their own, without the folder of the configuration."""
    one = project_in(tmp_path / "one", *ALL_KINDS)
    message = failed(one)
    printed = capfd.readouterr().err.splitlines()
    if apart:
        of = Modules.of
        monkeypatch.setattr(Pool, "is_one_machine", False)
        monkeypatch.setattr(
            Modules, "of", lambda *folders: of(*folders)._replace(folder=tmp_path / "nowhere")
        )
    other = project_in(tmp_path / "other", *ALL_KINDS, execution=on(cluster))
    assert failed(other) == message
    assert files_of(other) == files_of(one)
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(printed)


def test_an_actor_and_a_node_that_are_killed_cost_their_shards_alone(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = [reward("length", name=f"length {number}") for number in range(6)]
    one = project_in(tmp_path / "one", *rewards)
    scored(one)
    lost, killed = cluster.add_node(num_cpus=1), list[str]()
    answer_of = Pool._answer_of

    def kill(pool: Pool, now: Any, worker: Worker, what: str) -> Any:
        others: list[Any] = [*{*pool._busy} - {worker}]
        if others and not killed:
            killed.append("actor")
            ray.kill(others[0]._actor)
        elif others and len(killed) == 1:
            killed.append("node")
            cluster.remove_node(lost, allow_graceful=False)
        return answer_of(pool, now, worker, what)

    monkeypatch.setattr(Pool, "_answer_of", kill)
    monkeypatch.setattr(ray_actors, "WAIT_S", 2)  # there is no place for a third any more
    execution = {**on(cluster), "scorers": {"count": 3}}
    other = project_in(tmp_path / "other", *rewards, execution=execution)
    scored(other)
    assert killed == ["actor", "node"]
    assert files_of(other) == files_of(one)


def test_a_scorer_that_is_ended_takes_its_processes_with_it(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a function is at work, in which nothing would end for an hour."""
    source = (
        "import os, subprocess, time\n\ndef never(completions):\n"
        f"    subprocess.Popen(['sleep', '600'], env={{**os.environ, 'SCORED_IN': {str(tmp_path)!r}}})\n"
        f"    open({str(tmp_path / 'begun')!r}, 'w').close()\n    time.sleep(600)\n"
    )
    run = project_in(tmp_path, {"function": "ends:never", "timeout_s": 3600.0}, execution=on(cluster))
    (tmp_path / "ends.py").write_text(source)

    def stop(self: Any) -> bool:
        if (tmp_path / "begun").exists():
            assert processes_of(tmp_path)
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(type(run.console), "is_stopping", stop)
    with pytest.raises(KeyboardInterrupt):
        scored(run)
    wait_for_none_of(tmp_path)


def test_a_machine_without_the_module_is_named(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project_in(tmp_path, reward("length"), execution=on(cluster))
    of = Modules.of
    monkeypatch.setattr(Modules, "of", classmethod(lambda cls, folder, root: of(tmp_path / "shared", root)))
    with pytest.raises(UsageError, match=r"'reward:length': no module file reward.py in \S+shared, and no"):
        scored(run)
