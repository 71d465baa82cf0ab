"""generate: policy + prompts -> rollouts.

Samples K responses per prompt and stores the log-probs they were sampled with: pi_old of the ratio, never
guessed later. Shards are committed one by one, and a committed shard is never sampled again.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from grpo import tables
from grpo.artifacts import FileRecord, Manifest, Plan, Run, Staging, id_of
from grpo.errors import DataError
from grpo.generate.engine import Engine, Group, Request, Sample, Sampling, group_seed
from grpo.generate.prompts import draw, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "generate"
OUTPUT = "rollouts"
STAGE_VERSION = 1


@dataclass
class Sampler:
    """What stays open between iterations: the engine, the tokenizer, the prompts."""

    engine: Engine
    tokenizer: "PreTrainedTokenizerBase"
    vocabulary_size: int
    prompts: pa.Table
    holds: str = ""
    """Id of the policy in the engine."""


def plan(run: Run, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when prompts or policy are missing."""
    config = run.config.generate
    run.require("prompts", None, "grpo run")
    if iteration > 0:
        run.require("update", iteration - 1, f"grpo update --iteration {iteration - 1}")
    references = ("prompts", f"policy@{iteration}")
    described = {**config.model_dump(), "engine": choose_engine(config.engine)[0]}
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config={"seed": run.config.seed, "generate": described},
        reads={reference: run.id_of(reference) or "" for reference in references},
        shards=_shards(run),
    )


def choose_engine(wanted: str) -> tuple[str, str]:
    """The engine to use and, in a few words, why."""
    return "transformers", "as configured" if wanted == "transformers" else "auto: the built-in engine"


@contextmanager
def open_tool(run: Run) -> Iterator[Sampler]:
    """Open the engine; its weights come with the first iteration."""
    from grpo.generate.transformers_engine import TransformersEngine
    from grpo.model import best_device, load_config, load_tokenizer

    name, why = choose_engine(run.config.generate.engine)
    device = best_device()
    run.console.say(f"engine: {name} on {device} ({why})")
    engine = TransformersEngine(device, run.config.generate.max_rows_per_batch)
    start = run.policy_folder(0)
    vocabulary = load_config(start).get_text_config().vocab_size
    try:
        yield Sampler(engine, load_tokenizer(start), vocabulary, run.read("prompts", None))
    finally:
        engine.close()


def run(run: Run, iteration: int, staging: Staging, tool: Sampler) -> Manifest:
    """Sample what is not committed yet, shard by shard, and commit `rollouts` of one iteration."""
    config = run.config.generate
    with staging.clock("prompts"):
        rows = draw(len(tool.prompts), run.config.seed, iteration, config.prompts_per_iteration)
        drawn = tool.prompts.take(rows).to_pylist()
        texts, token_ids = encode(drawn, tool.tokenizer)
    names = [staging.file_name("part", index) for index in range(len(staging.plan.shards))]
    todo = [index for index, name in enumerate(names) if staging.committed(name) is None]
    requests = [
        [_request(run, iteration, group, token_ids[group]) for group in range(*staging.plan.shards[index])]
        for index in todo
    ]
    with staging.clock("load"):
        policy_id = staging.plan.reads[f"policy@{iteration}"]
        if requests and tool.holds != policy_id:
            tool.engine.load(run.policy_folder(iteration))
            tool.holds = policy_id
    groups: dict[int, Group] = {}
    with _sampling(run, iteration, requests, tool, staging) as sampled:
        for group in sampled if requests else ():  # all committed, but for the manifest: no engine is loaded
            groups[group.group_id] = group
            for position, index in enumerate(todo):
                members = range(*staging.plan.shards[index])
                if group.group_id in members and all(member in groups for member in members):
                    shard = [groups.pop(member) for member in members]
                    with staging.clock("write"):
                        data = _table(run, iteration, shard, requests[position], drawn, texts, tool)
                        labels = _shard_numbers(shard)
                        staging.write_table(OUTPUT, names[index], data, **labels)
                    run.console.stop_requested()
    records = [staging.committed(name) for name in names]
    held = [record for record in records if record is not None]
    assert len(held) == len(names), "the engine left groups out"
    return staging.commit({OUTPUT: id_of(held)}, held, _summary(held))


@contextmanager
def _sampling(
    run: Run, iteration: int, requests: list[list[Request]], tool: Sampler, staging: Staging
) -> Iterator[Iterator[Group]]:
    """The engine's groups as they come, with a bar of the rollouts done and the time spent in the engine."""
    config = run.config.generate
    sampling = Sampling(config.temperature, config.max_new_tokens)
    total = sum(len(request.seeds) for shard in requests for request in shard)
    tokens, started = 0, time.perf_counter()
    with run.console.progress(f"generate {iteration}", total, "rollouts") as advance:

        def show(rollouts: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            advance(rollouts, f"{tokens / (time.perf_counter() - started):,.0f} tok/s")

        def groups() -> Iterator[Group]:
            source = tool.engine.sample(requests, sampling, partial(show, 0))
            while True:
                with staging.clock("sample"):
                    group = next(source, None)
                if group is None:
                    return
                show(len(group.samples), 0)
                yield group

        yield groups()


def _shards(run: Run) -> list[list[int]]:
    """[first group, one past the last] of each shard: whole groups, rollouts_per_shard at most."""
    config = run.config.generate
    size = max(1, config.rollouts_per_shard // config.samples_per_prompt)
    count = config.prompts_per_iteration
    return [[start, min(start + size, count)] for start in range(0, count, size)]


def _request(run: Run, iteration: int, group: int, prompt_token_ids: list[int]) -> Request:
    seed = group_seed(run.config.seed, iteration, group)
    return Request(group, prompt_token_ids, [seed + s for s in range(run.config.generate.samples_per_prompt)])


def _table(
    run: Run,
    iteration: int,
    groups: list[Group],
    requests: list[Request],
    drawn: list[dict[str, Any]],
    texts: list[str],
    tool: Sampler,
) -> pa.Table:
    """One shard of `rollouts`, checked."""
    request_of = {request.group_id: request for request in requests}
    for group in groups:
        if len(group.samples) != (wanted := len(request_of[group.group_id].seeds)):
            where = f"generate: group (iteration, group_id) {(iteration, group.group_id)}"
            raise DataError(f"{where}: the engine gave {len(group.samples)} samples for {wanted} seeds")
    places = [(group.group_id, s) for group in groups for s in range(len(group.samples))]
    samples = [sample for group in groups for sample in group.samples]
    for (group_id, sample_id), sample in zip(places, samples, strict=True):
        _check(sample, (iteration, group_id, sample_id), tool.vocabulary_size)
    lengths = [len(sample.token_ids) for sample in samples]
    token_ids = [sample.token_ids.tolist() for sample in samples]
    responses = tool.tokenizer.batch_decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    columns = {
        "iteration": [iteration] * len(samples),
        "group_id": [group for group, _ in places],
        "sample_id": [sample for _, sample in places],
        "prompt_id": [drawn[group]["prompt_id"] for group, _ in places],
        "round": [0] * len(samples),
        "prompt": [texts[group] for group, _ in places],
        "response": responses,
        "prompt_token_ids": [list(request_of[group].prompt_token_ids) for group, _ in places],
        "response_token_ids": token_ids,
        "old_logprobs": [sample.logprobs for sample in samples],
        "response_mask": [[True] * length for length in lengths],
        "finish_reason": [sample.finish_reason for sample in samples],
        "response_tokens": lengths,
        "policy_iteration": [iteration] * len(samples),
        "temperature": [run.config.generate.temperature] * len(samples),
        "seed": [request_of[group].seeds[sample] for group, sample in places],
    }
    return pa.table(columns, schema=tables.schema(OUTPUT))


def _check(sample: Sample, key: tuple[int, int, int], vocabulary_size: int) -> None:
    """Raise DataError (exit 3) for a sample that the learner could not trust."""
    where = f"generate: rollout (iteration, group_id, sample_id) {key}"
    if len(sample.logprobs) != len(sample.token_ids):
        raise DataError(f"{where}: {len(sample.logprobs)} log-probs for {len(sample.token_ids)} tokens")
    if not np.isfinite(sample.logprobs).all() or (sample.logprobs > 0).any():
        raise DataError(f"{where}: a log-prob is not finite or above 0")
    if len(sample.token_ids) and not 0 <= sample.token_ids.min() <= sample.token_ids.max() < vocabulary_size:
        raise DataError(f"{where}: a token id outside the vocabulary of {vocabulary_size}")


def _shard_numbers(groups: list[Group]) -> dict[str, Any]:
    """What a shard adds to the summary."""
    samples = [sample for group in groups for sample in group.samples]
    return {
        "response_tokens": sum(len(sample.token_ids) for sample in samples),
        "truncated": sum(sample.finish_reason == "length" for sample in samples),
    }


def _summary(records: list[FileRecord]) -> dict[str, Any]:
    rollouts = sum(record.rows or 0 for record in records)
    tokens = sum(record.labels["response_tokens"] for record in records)
    truncated = sum(record.labels["truncated"] for record in records)
    return {
        "rollouts": rollouts,
        "response_tokens": tokens,
        "mean_response_tokens": tokens / rollouts,
        "truncated_fraction": truncated / rollouts,
    }
