"""sampling: requests -> committed shards of rollouts: those of an iteration, or those of an evaluation."""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from grpo.artifacts import ActiveRun, FileRecord, Staging, same_weights_since
from grpo.config import GenerateConfig
from grpo.generate.engine_pool import Engines
from grpo.generate.engines.protocol import Engine, Group, Request, Sampling, group_seed
from grpo.generate.hand_out import HandOut
from grpo.generate.rollouts import SamplingTask, make_shard
from grpo.generate.weight_sync import WeightSync
from grpo.models.weight_check import read_weight_check
from grpo.models.weights import Lend
from grpo.prompts.chat import Chat
from grpo.prompts.rendering import encode
from grpo.prompts.source import Row
from grpo.sql import UserSql

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sampling_of(config: GenerateConfig, temperature: float, max_new_tokens: int) -> Sampling:
    """How to sample, by `generate` but for what an evaluation has of its own."""
    return Sampling(
        temperature,
        max_new_tokens,
        config.top_p,
        config.top_k,
        config.min_p,
        tuple(config.stop),
        config.repetition_penalty,
        config.structured_outputs,
    )


@dataclass
class Sampler:
    """What stays open between iterations: engine, weight_sync of policies to it, tokenizer, prompts.

    user_sql: the process of `generate.prompts_sql`, started where there is one. lend: gives policies.
    elsewhere: engines in other processes, which sample in place of `engine`; None: there are none.
    """

    engine: Engine
    weight_sync: WeightSync
    tokenizer: "PreTrainedTokenizerBase"
    vocabulary_size: int
    prompts: pa.Table
    user_sql: UserSql
    lend: Lend
    elsewhere: Engines | None = None


@dataclass
class Sampled:
    """A task whose shards are being sampled, by other processes maybe; wait() until they are committed."""

    staging: Staging
    task: SamplingTask
    engine: dict[str, Any]
    handout: HandOut | None = None

    def wait(self) -> tuple[list[FileRecord], dict[str, Any]]:
        """All shards of the task, and what the engine was. Raises what went wrong meanwhile."""
        if self.handout is not None:
            self.engine = self.handout.wait()
        held = [record for name in self.task.shards if (record := self.staging.committed(name)) is not None]
        assert len(held) == len(self.task.shards), "the engine left groups out"
        return held, self.engine

    def close(self) -> None:
        """Give up what is not committed yet."""
        if self.handout is not None:
            self.handout.close()


def sample(run: ActiveRun, staging: Staging, tool: Sampler, task: SamplingTask) -> Sampled:
    """Sample what of `task` is not committed yet, here; other processes only begin with it."""
    todo = [name for name in task.shards if staging.committed(name) is None]
    engine: dict[str, Any] = {"precision": None, "weight_check_difference": None}
    if todo and tool.elsewhere is not None:
        return Sampled(staging, task, engine, HandOut(run, staging, tool.elsewhere, tool.lend, task, todo))
    if todo:  # else all is committed but the manifest, and no engine is loaded
        difference = _bring_policy(run, staging, tool, task.policy)
        engine = {"precision": tool.engine.precision, "weight_check_difference": difference}
        _sample_shards(run, staging, tool, task, todo)
    return Sampled(staging, task, engine)


def _sample_shards(
    run: ActiveRun, staging: Staging, tool: Sampler, task: SamplingTask, names: list[str]
) -> None:
    """Commit each of these shards once its last group is there."""
    name_of = {group: name for name in names for group in task.shards[name]}
    done: dict[str, dict[int, Group]] = {name: {} for name in names}
    with closing(_groups(run, staging, tool, task, names)) as sampled:
        for group in sampled:
            name = name_of[group.group_id]
            done[name][group.group_id] = group
            shard = task.shards[name]
            if len(done[name]) < len(shard):
                continue
            with staging.clock("write"):
                groups = [done[name].pop(number) for number in shard]
                made = make_shard(task, shard, groups, tool.tokenizer, tool.vocabulary_size)
                staging.adopt(task.table, name, made.content, made.rows, **made.labels)
            run.console.stop_requested()


def _groups(
    run: ActiveRun, staging: Staging, tool: Sampler, task: SamplingTask, names: list[str]
) -> Generator[Group, None, None]:
    """The engine's groups as they come, with a bar of the rollouts done and the time spent in the engine."""
    shards = [[task.requests[group] for group in task.shards[name]] for name in names]
    total = sum(len(request.seeds) for shard in shards for request in shard)
    tokens, started = 0, time.perf_counter()
    with run.console.progress(f"{staging.plan.stage} {task.iteration}", total, "rollouts") as advance:

        def show(new_tokens: int, rollouts: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            advance(rollouts, f"{tokens / (time.perf_counter() - started):,.0f} tok/s")

        source, tail = tool.engine.sample(shards, task.sampling, show), tool.engine.tail
        while True:
            with tail.apart(staging.seconds, "sample"), staging.clock("sample"):
                group = next(source, None)
            if group is None:
                return
            yield group


def keep_shards(run: ActiveRun, staging: Staging, records: Sequence[FileRecord], prefix: str) -> None:
    """Commit the files of an earlier attempt under their new names, by hard links."""
    for index, record in enumerate(records):
        name = staging.file_name(prefix, index)
        if staging.committed(name) is None:
            source = run.path_of(record, staging.plan.output, staging.plan.iteration)
            staging.link_table(record, source, name)


def requests_of(
    rows: list[Row], tool: Sampler, chat: Chat, seed: int, iteration: int | str, samples: int
) -> tuple[list[str], list[Request]]:
    """Prompts as the model sees them, and a group for each; iteration: as group_seed()'s."""
    texts, token_ids = encode(rows, tool.tokenizer, chat)
    requests = []
    for group, ids in enumerate(token_ids):
        first = group_seed(seed, iteration, group)
        requests.append(Request(group, ids, list(range(first, first + samples))))
    return texts, requests


def _bring_policy(run: ActiveRun, staging: Staging, tool: Sampler, policy: int) -> float | None:
    """Put a policy into the engine, opening it the first time; see weight_sync.py."""
    sync, policy_id = tool.weight_sync, run.id_of(f"policy@{same_weights_since(run, policy)}") or ""
    if not sync.is_open:
        with staging.clock("open"):
            sync.open(run.start["policy"], read_weight_check(run.weight_check_path(0)))
    if sync.holds == policy_id:
        return None
    with staging.clock("load"), tool.lend(policy) as source:
        return sync.bring(policy_id, source, read_weight_check(run.weight_check_path(policy)))
