"""Weights by vLLM's own transfer: two engines in processes of their own, and what may go wrong on the way.

What NCCL does on GPUs, a TCP store does here (transfer_backend.py).
"""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event
from threading import enumerate as enumerate_threads
from typing import Any, NamedTuple, cast

import pytest
import torch
from tests.conftest import Grpo
from tests.generate.engines.test_vllm_engine import LONG, MAX_LENGTH, SHORT, write_checkpoint, write_project
from tests.generate.engines.test_vllm_workers import (
    CACHE,
    STALE,
    VOCABULARY,
    Fault,
    check_of,
    distance,
    kept_cache,
    shard_job,
    stale_head,
)

from grpo.errors import EngineError
from grpo.execute import Checkpoint, LocalProcesses, Pool, WorkerDied
from grpo.execute.processes import Process
from grpo.generate import engine_pool
from grpo.generate.engines.protocol import Engine
from grpo.generate.worker import EngineSettings, Job, OpenEngine, ShardResult, open_worker, opener
from grpo.models import weights
from grpo.models.loading import load_model
from grpo.models.weights import Weights

pytest.importorskip("vllm")

from tests.generate import transfer_backend

from grpo.generate import vllm_transfer
from grpo.generate.engines.vllm_engine import VllmEngine
from grpo.generate.vllm_transfer import Sender, TransferGroup

pytestmark = pytest.mark.xdist_group("vllm")


def make(*arguments: Any, transfer: str, **options: Any) -> Engine:
    """What an engine's process calls: it knows the backend then."""
    transfer_backend.register()
    assert transfer == transfer_backend.NAME
    return VllmEngine({}, MAX_LENGTH, transfer=transfer)


class Setting(NamedTuple):
    """A fault of vLLM's, which holds until the next one is set."""

    fault: Fault | None

    def __call__(self, opened: OpenEngine) -> None:
        state: Any = opened
        if (patch := getattr(state, "patch", None)) is not None:
            patch.undo()
        state.patch = pytest.MonkeyPatch()
        if self.fault is not None:
            self.fault(state.patch)


class Dying(NamedTuple):
    """A process that ends at a step of its next transfer."""

    step: str

    def __call__(self, opened: OpenEngine) -> None:
        def transfer(step: str, **info: Any) -> None:
            if step == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
            VllmEngine.transfer(opened.engine, step, **info)  # type: ignore[arg-type]

        opened.engine.transfer = transfer  # type: ignore[attr-defined]


@pytest.fixture(scope="module", autouse=True)
def small_caches() -> Iterator[None]:
    """There are up to four engines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The starting policy, and others that are far from it."""
    folder = tmp_path_factory.mktemp("transfer")
    return [write_checkpoint(folder / str(seed), seed) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def pool(policies: list[Path]) -> Iterator[Pool]:
    making = partial(make, transfer=transfer_backend.NAME)
    settings = EngineSettings(
        making, Checkpoint.of(policies[0]), check_of(policies[0]), VOCABULARY, "auto", 1
    )
    with closing(Pool(LocalProcesses(opener(settings)), 2, copies=False)) as opened:
        yield opened


@pytest.fixture
def sender(pool: Pool) -> Iterator[Sender]:
    transfer_backend.register()
    sender = Sender(pool, 1, transfer_backend.meeting)
    yield sender
    sender.leave()


def go_on() -> None:
    """Nobody asks to stop."""


def weights_of(policy: Path) -> Weights:
    return Weights(load_model(policy, "cpu"), policy)


def send(sender: Sender, policy: Path, weights: Weights | None = None) -> list[float]:
    answers = sender.send(weights or weights_of(policy), policy.name, check_of(policy), "generate 3", go_on)
    return [difference for difference, _ in answers]


def shards(pool: Pool, policy: Path) -> dict[str, ShardResult]:
    jobs = {str(n): shard_job(policy, prompts, None) for n, prompts in enumerate((SHORT, LONG))}
    return dict(pool.run(jobs, "generate 3", go_on, may_start=False))


def is_of(results: Mapping[str, ShardResult], policy: Path) -> bool:
    return len(results) == 2 and all(distance(result, policy) < 1e-5 for result in results.values())


def test_all_engines_have_the_policy_that_was_sent(
    pool: Pool, sender: Sender, policies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them, again and again in the group that is there; that no file is read for it."""
    start, first, second = policies
    monkeypatch.setattr(Weights, "written", None)
    groups = list[int]()

    def meeting(host: str, port: int, world: int) -> Any:
        groups.append(world)
        return transfer_backend.meeting(host, port, world)

    monkeypatch.setattr(sender, "_meeting", meeting)
    for policy in (first, second, start, first):
        differences = send(sender, policy)
        assert len(differences) == 2
        assert max(differences) < 1e-5
        assert is_of(shards(pool, policy), policy)
    assert groups == [3]


def skipped(patch: pytest.MonkeyPatch) -> None:
    """An engine that says that it has taken them."""
    for name in ("start_weight_update", "update_weights", "finish_weight_update"):
        patch.setattr(transfer_backend.StoreEngine, name, lambda engine, update_info=None: None)


WHAT = {
    "an engine skipped": (skipped, STALE),
    "a stale head": (stale_head, STALE),
    "a kept prefix cache": (kept_cache, CACHE),
}


@pytest.mark.parametrize("what", WHAT)
def test_what_does_not_arrive_is_found_before_anything_is_sampled(
    pool: Pool, sender: Sender, policies: list[Path], what: str
) -> None:
    fault, message = WHAT[what]
    start, first, second = policies
    send(sender, start)
    assert is_of(shards(pool, start), start)  # prompts are cached
    pool.ask_all([Setting(fault), Setting(None)])  # of one of the two
    with pytest.raises(EngineError, match=message) as found:
        send(sender, second)
    assert found.value.exit_code == 8
    assert max(send(sender, first)) < 1e-5  # with another one in its place
    assert is_of(shards(pool, first), first)


def test_a_layer_that_is_not_sent_is_found(
    pool: Pool, sender: Sender, policies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, first, _ = policies

    def rest(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: each for name, each in whole.items() if ".layers.0." not in name}

    send(sender, start)
    with monkeypatch.context() as patch:
        published, state = Weights.published, weights.published_state
        patch.setattr(vllm_transfer, "published_state", lambda model: rest(state(model)))
        patch.setattr(Weights, "published", lambda weights: iter(rest(dict(published(weights))).items()))
        with pytest.raises(EngineError, match=STALE):
            send(sender, first)
    assert max(send(sender, first)) < 1e-5


@pytest.mark.parametrize("step", ["init_weight_transfer_engine", "update_weights"])
def test_an_engine_that_dies_meanwhile_costs_time_alone(
    pool: Pool, sender: Sender, policies: list[Path], step: str
) -> None:
    start, first, _ = policies
    if step == "update_weights":
        send(sender, start)  # they have met
    else:
        dict(pool.run({"0": vllm_transfer.be_open, "1": vllm_transfer.be_open}, "test", go_on))
    pool.ask_all([Dying(step), vllm_transfer.be_open])
    differences = send(sender, first)
    assert len(differences) == 2
    assert max(differences) < 1e-5
    assert is_of(shards(pool, first), first)


def open_registered(settings: EngineSettings) -> Callable[[Job], Any]:
    """What the product opens, with this backend there."""
    transfer_backend.register()
    return open_worker(settings)


@pytest.fixture
def by_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """`execution.weights: memory` without GPUs."""
    transfer_backend.register()
    monkeypatch.setattr(engine_pool, "check_engines", lambda config, engine, device: None)
    monkeypatch.setattr(engine_pool, "TRANSFER", transfer_backend.NAME)
    monkeypatch.setattr(engine_pool, "opener", lambda settings: partial(open_registered, settings))
    monkeypatch.setattr(vllm_transfer, "Sender", lambda pool, gpus: Sender(pool, 1, transfer_backend.meeting))


def kill_at_answers(monkeypatch: pytest.MonkeyPatch, policies: range, all_of_them: bool) -> list[str]:
    """Engines are killed once, as soon as a shard of one of these policies is there: one, or all."""
    answer_of, killed = Pool._answer_of, list[str]()

    def kill(pool: Pool, now: Any, worker: Any, what: str) -> Any:
        others = {*pool.idle, *pool._busy} - (set() if all_of_them else {worker})
        wanted = [f"generate {number}" for number in policies]
        found = answer_of(pool, now, worker, what)
        if what in wanted and not killed and now.done and "engine 0" not in now.jobs:
            for other in others:
                assert isinstance(other, Process)
                assert other.pid is not None
                os.kill(other.pid, signal.SIGKILL)
            killed.append(what)
        return found

    monkeypatch.setattr(Pool, "_answer_of", kill)
    return killed


@pytest.mark.slow
def test_a_run_survives_an_engine_and_resumes_when_all_are_gone(
    policies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo, by_store: None
) -> None:
    """No weights are written for engines, and none are read once they are open."""
    monkeypatch.chdir(write_project(tmp_path / "p", policies[0], 8, {}))
    monkeypatch.setattr(Weights, "written", None)
    changes = ("execution={engines: {count: 2}, weights: memory}", "generate.rollouts_per_shard=2")
    command = ("run", *(part for change in changes for part in ("--set", change)))
    with monkeypatch.context() as patch:
        killed = kill_at_answers(patch, range(1, 2), all_of_them=False)
        code, _, err = grpo(*command, "--set", "iterations=3")
    assert code == 0, err
    assert killed == ["generate 1"]
    with monkeypatch.context() as patch:
        killed = kill_at_answers(patch, range(4, 5), all_of_them=True)
        code, _, err = grpo(*command, "--set", "iterations=5")
    assert code == 7
    assert killed == ["generate 4"]
    assert "generate 4: all workers have ended that had what it needs; what is committed is kept" in err
    code, _, err = grpo(*command, "--set", "iterations=5")
    assert code == 0, err
    code, out, err = grpo("sql", "select mismatch_mean, ratio_max from updates", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert len(rows) == 5
    for row in rows:
        assert row["mismatch_mean"] < 1e-4
        assert abs(row["ratio_max"] - 1) < 1e-3


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        ("{engines: {}, weights: memory}", "goes from this process's GPU to those of engines"),
        ("{scorers: {}, weights: memory}", "is for engines in other processes; this one has the weights"),
    ],
)
def test_what_has_no_gpu_is_refused(project: Path, grpo: Grpo, execution: str, message: str) -> None:
    code, _, err = grpo("run", "--set", f"execution={execution}")
    assert code == 2
    assert message in err.splitlines()[-1]


def test_nccl_has_a_place_for_each_gpu() -> None:
    """As vLLM reads it; nothing of NCCL itself can be tried without GPUs."""
    group: Any = vllm_transfer.nccl("10.0.0.1", 29500, 5)
    assert (group.backend, group.is_sender) == ("nccl", True)
    assert (group.master_address, group.master_port, group.world_size) == ("10.0.0.1", 29500, 5)


def group_of_three(gpus: int, meeting: Any = vllm_transfer.nccl) -> tuple[TransferGroup, list[Any]]:
    """Of engines that are none, and what they were asked."""
    asked: list[Any] = []

    class Three:
        host = "127.0.0.1"
        idle = (1, 2, 3)
        ask_all = asked.append

    return TransferGroup(cast(Pool, Three()), gpus, meeting), asked


def test_engines_of_several_gpus_join_behind_each_other() -> None:
    group, asked = group_of_three(gpus=4)
    group.init_weight_transfer_engine({"rank_offset": 1, "world_size": 13})
    [steps] = asked
    assert [step.info["init_info"] for step in steps] == [
        {"rank_offset": offset, "world_size": 13} for offset in (1, 5, 9)
    ]


def test_a_thread_that_was_left_behind_asks_no_engine(
    policies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it hung in comes back when a later transfer is under way."""
    monkeypatch.setattr(vllm_transfer, "_GRACE_S", 0.1)
    released, ended = Event(), list[str]()

    class Hanging:
        def shutdown(self) -> None:
            ended.append("the group")

        def send_weights(self) -> None:
            group._failures.append(WorkerDied("by SIGKILL"))  # as an engine's answer tells it
            released.wait()
            group.start_weight_update()

    group, asked = group_of_three(gpus=1)
    monkeypatch.setattr(group, "_meet", Hanging)
    weights, before = weights_of(policies[0]), {*enumerate_threads()}
    with pytest.raises(WorkerDied, match="by SIGKILL"):
        group.send(weights, vllm_transfer.Taken("1", check_of(policies[0])), "generate 3")
    group.leave()
    [left] = {*enumerate_threads()} - before
    released.set()
    left.join(60)
    assert not left.is_alive()
    assert asked == []
    assert ended == ["the group"]
