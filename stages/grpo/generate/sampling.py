"""sampling: requests -> committed shards of rollouts: those of an iteration, or those of an evaluation."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from grpo.artifacts import ActiveRun, FileRecord, Staging, digest
from grpo.config import GenerateConfig
from grpo.generate.engines.protocol import Engine, Group, Request, Sampling, group_seed
from grpo.generate.rollouts import Draws, rollouts_table, shard_numbers
from grpo.generate.weight_sync import WeightSync
from grpo.models.weight_check import read_weight_check
from grpo.prompts.chat import Chat, encode
from grpo.prompts.source import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Sampler:
    """What stays open between iterations: engine, weight_sync of policies to it, tokenizer, prompts."""

    engine: Engine
    weight_sync: WeightSync
    tokenizer: "PreTrainedTokenizerBase"
    vocabulary_size: int
    prompts: pa.Table
    is_open: bool = False
    """Whether the engine has been opened and has shown that it follows new weights."""


@dataclass(frozen=True)
class Work:
    """What is to be sampled of a policy: the rollouts of its iteration, or those it is evaluated by."""

    table: str
    """rollouts, or eval_rollouts."""
    prefix: str
    """What the names of its files begin with."""
    iteration: int
    """Of the rollouts; of an evaluation, the policy's."""
    policy: int
    draws: Draws
    requests: list[Request]
    """One per group, by group_id."""
    shards: Sequence[range]
    """Groups of each shard."""
    groups_per_round: int
    sampling: Sampling


def sample(
    run: ActiveRun, staging: Staging, tool: Sampler, work: Work
) -> tuple[list[FileRecord], dict[str, Any]]:
    """Sample what of `work` is not committed yet; all its shards, and what the engine was."""
    names = shard_names(staging, work)
    todo = [index for index, name in enumerate(names) if staging.committed(name) is None]
    shards = [[work.requests[group] for group in work.shards[index]] for index in todo]
    difference = _bring_policy(run, staging, tool, work.policy) if todo else None
    place_of = {request.group_id: place for place, shard in enumerate(shards) for request in shard}
    done: list[dict[int, Group]] = [{} for _ in shards]
    with _sampling(run, staging, tool, work, shards) as sampled:
        for group in sampled if todo else ():  # all committed, but for the manifest: no engine is loaded
            place = place_of[group.group_id]
            done[place][group.group_id] = group
            if len(done[place]) == len(shards[place]):
                groups = [done[place].pop(request.group_id) for request in shards[place]]
                with staging.clock("write"):
                    data = _table(shards[place], groups, tool, work)
                    labels = shard_numbers(groups)
                    if work.draws.by_query is not None:
                        labels["prompts"] = drawn_digest(work.draws, work.shards[todo[place]])
                    staging.write_shard(work.table, names[todo[place]], data, **labels)
                run.console.stop_requested()
    records = [staging.committed(name) for name in names]
    held = [record for record in records if record is not None]
    assert len(held) == len(names), "the engine left groups out"
    precision = tool.engine.precision if todo else None  # nothing was left to sample: no engine
    return held, {"precision": precision, "weight_check_difference": difference}


def shard_names(staging: Staging, work: Work) -> list[str]:
    """The file of each shard of `work`."""
    return [staging.file_name(work.prefix, index) for index in range(len(work.shards))]


def drawn_digest(draws: Draws, groups: range) -> str:
    """Digest of the prompts of some groups."""
    return digest([draws.prompt_ids[group] for group in groups])


def draws_of(rows: list[Row], tool: Sampler, chat: Chat, by_query: int | None = None) -> Draws:
    """Rows of prompts as the model sees them; by_query: how many a query of the user's chose."""
    texts, token_ids = encode(rows, tool.tokenizer, chat)
    return Draws([row["prompt_id"] for row in rows], texts, token_ids, by_query)


def requests_of(draws: Draws, seed: int, iteration: int | str, samples: int) -> list[Request]:
    """A request for each group, with the seeds of its samples; iteration: as group_seed()'s."""
    seeds = [group_seed(seed, iteration, group) for group in range(len(draws.token_ids))]
    return [
        Request(group, token_ids, list(range(seeds[group], seeds[group] + samples)))
        for group, token_ids in enumerate(draws.token_ids)
    ]


def sampling_of(config: GenerateConfig, temperature: float, max_new_tokens: int) -> Sampling:
    """How to sample, with the configured cuts of the distribution."""
    return Sampling(temperature, max_new_tokens, config.top_p, config.top_k, config.min_p)


def _bring_policy(run: ActiveRun, staging: Staging, tool: Sampler, policy: int) -> float | None:
    """Put a policy into the engine, opening it the first time; see weight_sync.py."""
    if not tool.is_open:
        with staging.clock("open"):
            check = read_weight_check(run.weight_check_path(0))
            tool.weight_sync.open(run.policy_folder(0), check, run.staging_root(None))
        tool.is_open = True
    with staging.clock("load"):
        policy_id = staging.plan.inputs[f"policy@{policy}"]
        check = read_weight_check(run.weight_check_path(policy))
        return tool.weight_sync.bring(policy_id, run.policy_folder(policy), check)


@contextmanager
def _sampling(
    run: ActiveRun, staging: Staging, tool: Sampler, work: Work, shards: list[list[Request]]
) -> Iterator[Iterator[Group]]:
    """The engine's groups as they come, with a bar of the rollouts done and the time spent in the engine."""
    total = sum(len(request.seeds) for shard in shards for request in shard)
    tokens, started = 0, time.perf_counter()
    with run.console.progress(f"{staging.plan.stage} {work.iteration}", total, "rollouts") as advance:

        def show(rollouts: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            advance(rollouts, f"{tokens / (time.perf_counter() - started):,.0f} tok/s")

        def groups() -> Iterator[Group]:
            source = tool.engine.sample(shards, work.sampling, partial(show, 0))
            while True:
                with staging.clock("sample"):
                    group = next(source, None)
                if group is None:
                    return
                show(len(group.samples), 0)
                yield group

        yield groups()


def _table(requests: list[Request], groups: list[Group], tool: Sampler, work: Work) -> pa.Table:
    return rollouts_table(
        requests,
        groups,
        work.draws,
        tool.tokenizer,
        tool.vocabulary_size,
        iteration=work.iteration,
        round=requests[0].group_id // work.groups_per_round,
        policy_iteration=work.iteration,
        temperature=work.sampling.temperature,
    )
