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

import pyarrow as pa

from grpo.artifacts import FileRecord, Manifest, Plan, Run, Staging, id_of
from grpo.config import GenerateConfig
from grpo.errors import UsageError
from grpo.generate.chat import chat_of
from grpo.generate.engine import Engine, Group, Request, Sampling, group_seed
from grpo.generate.engine_choice import choose_engine, default_dtype
from grpo.generate.handover import Handover
from grpo.generate.prompts import draw, encode
from grpo.generate.rollouts import Draws, rollouts_table, shard_numbers
from grpo.probe import LENGTH, read_probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "generate"
OUTPUT = "rollouts"
STAGE_VERSION = 3  # 3: the built-in engine adds up attention otherwise, which may change bits


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
    if described["engine"] == "vllm":
        described["engine_options"] = {"dtype": default_dtype(), **config.engine_options}
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
    if name != "vllm" and (truncated := run.config.generate.truncation()):
        raise UsageError(f"generate.{truncated}: needs engine: vllm, but {name} is taken ({why})")
    device = best_device()
    run.console.say(f"engine: {name} on {device} ({why})")
    if name != "vllm" and run.config.generate.engine_options:
        run.console.say("generate.engine_options: are vLLM's; the built-in engine has none")
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
    with staging.clock("prompts"):
        draws = _draw(run, iteration, tool)
    names = [staging.file_name("part", index) for index in range(len(staging.plan.shards))]
    todo = [index for index, name in enumerate(names) if staging.committed(name) is None]
    shards = [
        [_request(run, iteration, group, draws) for group in range(*staging.plan.shards[index])]
        for index in todo
    ]
    difference = _bring_policy(run, iteration, staging, tool) if todo else None
    place_of = {request.group_id: place for place, shard in enumerate(shards) for request in shard}
    done: list[dict[int, Group]] = [{} for _ in shards]
    with _sampling(run, iteration, shards, tool, staging) as sampled:
        for group in sampled if todo else ():  # all committed, but for the manifest: no engine is loaded
            place = place_of[group.group_id]
            done[place][group.group_id] = group
            if len(done[place]) == len(shards[place]):
                groups = [done[place].pop(request.group_id) for request in shards[place]]
                with staging.clock("write"):
                    data = _table(run, iteration, shards[place], groups, draws, tool)
                    staging.write_table(OUTPUT, names[todo[place]], data, **shard_numbers(groups))
                run.console.stop_requested()
    records = [staging.committed(name) for name in names]
    held = [record for record in records if record is not None]
    assert len(held) == len(names), "the engine left groups out"
    precision = tool.engine.precision if todo else None  # nothing was left to sample: no engine
    engine = {"precision": precision, "probe_difference": difference}
    return staging.commit({OUTPUT: id_of(held)}, held, {**_summary(held), **engine})


def _draw(run: Run, iteration: int, tool: Sampler) -> Draws:
    rows = draw(len(tool.prompts), run.config.seed, iteration, run.config.generate.prompts_per_iteration)
    drawn = tool.prompts.take(rows).to_pylist()
    texts, token_ids = encode(drawn, tool.tokenizer, chat_of(run.config.prompts, run.imports))
    return Draws([row["prompt_id"] for row in drawn], texts, token_ids)


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


def _request(run: Run, iteration: int, group: int, draws: Draws) -> Request:
    seed = group_seed(run.config.seed, iteration, group)
    return Request(
        group, draws.token_ids[group], [seed + s for s in range(run.config.generate.samples_per_prompt)]
    )


def _table(
    run: Run, iteration: int, requests: list[Request], groups: list[Group], draws: Draws, tool: Sampler
) -> pa.Table:
    return rollouts_table(
        requests,
        groups,
        draws,
        tool.tokenizer,
        tool.vocabulary_size,
        iteration=iteration,
        round=0,
        policy_iteration=iteration,
        temperature=run.config.generate.temperature,
    )


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
