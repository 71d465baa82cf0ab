"""worker: an engine in a process of its own: a shard's requests -> the shard, as it is committed.

The process knows nothing of the run: what it samples is a function of what it is sent.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from grpo.artifacts import checkpoint_files
from grpo.errors import ResourceError
from grpo.generate.engines.protocol import Engine, Group
from grpo.generate.rollouts import Made, SamplingTask, make_shard
from grpo.generate.weight_sync import WeightSync
from grpo.models.loading import load_tokenizer
from grpo.models.weight_check import WeightCheck

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEN_S = 60


class Checkpoint(NamedTuple):
    """One that is to be read in another process, maybe of another machine; sizes: of its files, in bytes."""

    folder: Path
    sizes: dict[str, int]

    @classmethod
    def of(cls, folder: Path) -> "Checkpoint":
        """The one that is in `folder`."""
        folder = folder.resolve()
        return cls(folder, {path.name: path.stat().st_size for path in checkpoint_files(folder)})

    def seen(self) -> Path:
        """The folder, as soon as all of it is seen here: on a shared store, names come late to others.

        Raises ResourceError (exit 7) where it is not, SEEN_S later.
        """
        until = time.monotonic() + SEEN_S
        while missing := [name for name, size in self.sizes.items() if _size_of(self.folder / name) != size]:
            if time.monotonic() > until:
                raise ResourceError(
                    f"execution: {platform.node()} does not see {self.folder / missing[0]} as it was written;"
                    " artifacts have to be on a store that every node has at the same path"
                )
            time.sleep(0.1)
        return self.folder


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


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # not there yet, or a handle of a file that was
        return None


def opener(settings: EngineSettings) -> Callable[[], Callable[[Job], Any]]:
    """open_worker() of these settings, as a pool takes it."""
    return partial(open_worker, settings)
