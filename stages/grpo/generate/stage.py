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
from grpo.config import GenerateConfig
from grpo.errors import DataError
from grpo.generate.engine import Engine, Group, Request, Sample, Sampling, group_seed
from grpo.generate.engine_choice import choose_engine
from grpo.generate.handover import Handover
from grpo.generate.prompts import draw, encode
from grpo.probe import LENGTH, read_probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "generate"
OUTPUT = "rollouts"
STAGE_VERSION = 1


@dataclass
class Sampler:
    """What stays open between iterations: engine, handover of policies to it, tokenizer, prompts."""

    engine: Engine
    handover: Handover
    tokenizer: "PreTrainedTokenizerBase"
    vocabulary_size: int
    prompts: pa.Table
    is_open: bool = False
    """Whether the engine has been opened and has shown that it follows new weights."""


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


@contextmanager
def open_tool(run: Run) -> Iterator[Sampler]:
    """Choose the engine; it is opened when the first iteration needs it."""
    from grpo.model import best_device, context_length, load_config, load_tokenizer

    name, why = choose_engine(run.config.generate.engine)
    device = best_device()
    run.console.say(f"engine: {name} on {device} ({why})")
    start = run.policy_folder(0)
    config = load_config(start)
    prompts = run.require("prompts", None, "grpo run")
    longest = int(prompts.summary["longest_prompt_tokens"])
    engine = make_engine(run.config.generate, name, device, context_length(config), longest)
    vocabulary = config.get_text_config().vocab_size
    handover = Handover(engine, device, run.console.say)
    try:
        yield Sampler(engine, handover, load_tokenizer(start), vocabulary, run.read("prompts", None))
    finally:
        engine.close()


def release(tool: Sampler) -> None:
    """Leave the accelerator to the next stage."""
    tool.handover.release()


def make_engine(
    config: GenerateConfig, name: str, device: str, context: int | None, longest_prompt: int
) -> Engine:
    """The engine `name` with nothing loaded yet; context: positions the model has, longest_prompt: tokens.

    Raises EngineError or UsageError where vLLM is not what is needed, or not given what it knows.
    """
    if name == "transformers":
        from grpo.generate.transformers_engine import TransformersEngine

        return TransformersEngine(device, config.max_rows_per_batch)
    from grpo.generate.vllm_engine import VllmEngine

    # A probe is scored by sampling one token behind it.
    needed = max(longest_prompt + config.max_new_tokens, LENGTH + 1)
    return VllmEngine(config.engine_options, needed if context is None else min(needed, context))


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
    difference = _bring_policy(run, iteration, staging, tool) if requests else None
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
    precision = tool.engine.precision if requests else None  # nothing was left to sample: no engine
    engine = {"precision": precision, "probe_difference": difference}
    return staging.commit({OUTPUT: id_of(held)}, held, {**_summary(held), **engine})


def _bring_policy(run: Run, iteration: int, staging: Staging, tool: Sampler) -> float | None:
    """Put the iteration's policy into the engine, opening it the first time; see handover.py."""
    if not tool.is_open:
        with staging.clock("open"):
            tool.handover.open(run.policy_folder(0), read_probe(run.probe_path(0)), run.staging_root(None))
        tool.is_open = True
    with staging.clock("load"):
        policy_id = staging.plan.reads[f"policy@{iteration}"]
        probe = read_probe(run.probe_path(iteration))
        return tool.handover.bring(policy_id, run.policy_folder(iteration), probe)


@contextmanager
def _sampling(
    run: Run, iteration: int, requests: list[list[Request]], tool: Sampler, staging: Staging
) -> Iterator[Iterator[Group]]:
    """The engine's groups as they come, with a bar of the rollouts done and the time spent in the engine."""
    config = run.config.generate
    sampling = Sampling(config.temperature, config.max_new_tokens, config.top_p, config.top_k, config.min_p)
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
