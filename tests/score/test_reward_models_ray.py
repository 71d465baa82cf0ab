"""Reward models in scorers on a Ray cluster of two nodes: the files of one process, and the GPU is theirs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.execute.clusters import two_nodes
from tests.score.model_openers import open_on_gpu, opened_by
from tests.score.test_reward_models_elsewhere import BOTH, with_models
from tests.score.test_score_stage import reward, scored, values
from tests.score.test_scorers_elsewhere import files_of

from grpo.errors import UsageError
from grpo.execute import Pool, Worker

pytest.importorskip("ray")
import ray

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two cores each: one for a scorer that calls functions, one for a reward model."""
    with two_nodes(2) as found:
        yield found


def on(cluster: Any, **more: int) -> dict[str, Any]:
    return {"backend": "ray", "address": cluster.address, "scorers": {"count": 2, **more}}


def test_an_actor_that_is_killed_costs_its_shards_alone(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = (*BOTH, reward("length"))
    one = with_models(tmp_path / "one", *three, on_error="drop")
    scored(one)
    killed, answer_of = list[str](), Pool._answer_of

    def kill(pool: Pool, now: Any, worker: Worker, what: str) -> Any:
        others: list[Any] = [each for each in pool._busy if each is not worker]
        if others and not killed and pool._busy[others[0]].name.startswith(("rm/", "other/")):
            killed.append(pool._busy[others[0]].name)
            ray.kill(others[0]._actor)
        return answer_of(pool, now, worker, what)

    monkeypatch.setattr(Pool, "_answer_of", kill)
    other = with_models(tmp_path / "other", *three, execution=on(cluster), on_error="drop")
    scored(other)
    assert killed
    assert files_of(other) == files_of(one)


def test_a_gpu_is_for_reward_models_alone(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one, on a node of its own: nothing else could be scored, if a function took it."""
    two = (BOTH[1], reward("length"))
    run = with_models(tmp_path / "p", *two, execution=on(cluster, gpus=1, count=1))
    node = cluster.add_node(num_cpus=1, num_gpus=1)
    try:
        with pytest.raises(UsageError, match=r"execution\.scorers\.gpus: torch finds none on \S+; a torch"):
            scored(run)
        opened_by(monkeypatch, open_on_gpu, tmp_path / "note")
        scored(run)
    finally:
        cluster.remove_node(node)
    assert (tmp_path / "note").read_text() == "cuda 0"
    assert values(run, "length") == [1.0, 2.0, 1.0, 4.0, 0.0, 2.0]
