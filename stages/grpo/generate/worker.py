"""worker: an engine in a process of its own: a shard's requests -> the shard, as it is committed.

The process knows nothing of the run: what it samples is a function of what it is sent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from grpo.execute import Checkpoint
from grpo.generate.engines.protocol import Engine, Group
from grpo.generate.rollouts import Made, SamplingTask, make_shard
from grpo.generate.weight_sync import WeightSync
from grpo.models.loading import load_tokenizer
from grpo.models.weight_check import WeightCheck

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is made of; threads: of torch, on which the last bits of what it computes depend."""

    make_engine: Callable[[], Engine]
    start: Checkpoint  # the starting policy
    start_check: WeightCheck
    vocabulary_size: int
    attention: str
    threads: int


@dataclass
class OpenEngine:
    """An engine that follows new weights, and what it has said since the last answer."""

    engine: Engine
    sync: WeightSync
    tokenizer: "PreTrainedTokenizerBase"
    vocabulary_size: int
    said: list[str]

    def tell(self) -> list[str]:
        """What it has said, once."""
        told, self.said[:] = [*self.said], []
        return told


class Job(Protocol):
    """What a worker is asked for; it answers with what this returns."""

    def __call__(self, opened: OpenEngine) -> Any:
        """Do it."""


class ShardResult(NamedTuple):
    """The shard; difference: of the weight check, where the policy was brought for it."""

    made: Made
    precision: str
    difference: float | None
    said: list[str]


class ShardJob(NamedTuple):
    """Sample the one shard of `task` of a policy; source: None where the engine has been sent it before."""

    task: SamplingTask
    policy_id: str
    source: Checkpoint | None
    check: WeightCheck

    def __call__(self, opened: OpenEngine) -> ShardResult:
        """The shard, of the policy, which is brought first if need be."""
        sync, difference = opened.sync, None
        if sync.holds != self.policy_id:
            assert self.source is not None, "a policy that is in memory is sent to whoever samples it"
            difference = sync.bring(self.policy_id, self.source.seen(), self.check)
        [shard] = self.task.shards.values()
        requests = [self.task.requests[group] for group in shard]
        groups: dict[int, Group] = {
            group.group_id: group
            for group in opened.engine.sample([requests], self.task.sampling, lambda tokens, rollouts: None)
        }
        in_order = [groups[number] for number in shard]
        made = make_shard(self.task, shard, in_order, opened.tokenizer, opened.vocabulary_size)
        return ShardResult(made, opened.engine.precision, difference, opened.tell())


def open_worker(settings: EngineSettings) -> Callable[[Job], Any]:
    """Make the engine, and prove that it follows new weights. Raises as WeightSync.open()."""
    torch.set_num_threads(settings.threads)
    engine, said = settings.make_engine(), list[str]()
    sync = WeightSync(engine, said.append, settings.attention)
    start = settings.start.seen()
    sync.open(start, settings.start_check)
    opened = OpenEngine(engine, sync, load_tokenizer(start), settings.vocabulary_size, said)
    return lambda job: job(opened)


def opener(settings: EngineSettings) -> Callable[[], Callable[[Job], Any]]:
    """open_worker() of these settings, as a pool takes it."""
    return partial(open_worker, settings)
