"""worker: an engine in a process of its own: a shard's requests -> the shard, as it is committed.

The process knows nothing of the run: what it samples is a function of what it is sent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from grpo.execute import Checkpoint
from grpo.generate.engines.protocol import Engine, Group
from grpo.generate.rollouts import Made, SamplingTask, make_shard
from grpo.generate.weight_sync import WeightSync
from grpo.models.loading import load_tokenizer
from grpo.models.weight_check import WeightCheck


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is made of; threads: of torch, on which the last bits of what it computes depend."""

    make_engine: Callable[[], Engine]
    start: Checkpoint  # the starting policy
    start_check: WeightCheck
    vocabulary_size: int
    attention: str
    threads: int


class ShardJob(NamedTuple):
    """Sample the one shard of `task` of a policy."""

    task: SamplingTask
    policy_id: str
    source: Checkpoint
    check: WeightCheck


class ShardResult(NamedTuple):
    """The shard; difference: of the weight check, where the policy was brought for it."""

    made: Made
    precision: str
    difference: float | None
    said: list[str]


def open_worker(settings: EngineSettings) -> Callable[[ShardJob], ShardResult]:
    """Make the engine, and prove that it follows new weights. Raises as WeightSync.open()."""
    torch.set_num_threads(settings.threads)
    engine, said = settings.make_engine(), list[str]()
    sync = WeightSync(engine, said.append, settings.attention)
    start = settings.start.seen()
    sync.open(start, settings.start_check)
    tokenizer = load_tokenizer(start)

    def sample(job: ShardJob) -> ShardResult:
        difference = None
        if sync.holds != job.policy_id:
            difference = sync.bring(job.policy_id, job.source.seen(), job.check)
        [shard] = job.task.shards.values()
        requests = [job.task.requests[group] for group in shard]
        groups: dict[int, Group] = {
            group.group_id: group
            for group in engine.sample([requests], job.task.sampling, lambda tokens, rollouts: None)
        }
        in_order = [groups[number] for number in shard]
        made = make_shard(job.task, shard, in_order, tokenizer, settings.vocabulary_size)
        told, said[:] = [*said], []
        return ShardResult(made, engine.precision, difference, told)

    return sample


def opener(settings: EngineSettings) -> Callable[[], Callable[[ShardJob], ShardResult]]:
    """open_worker() of these settings, as a pool takes it."""
    return partial(open_worker, settings)
