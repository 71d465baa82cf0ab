"""generate: policy + prompts -> rollouts.

Samples K responses per prompt and stores the log-probs they were sampled with: pi_old of the ratio, never
guessed later. Shards are committed one by one, and a committed shard is never sampled again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grpo import sql
from grpo.artifacts import FileRecord, Manifest, Plan, Run, Staging, id_of
from grpo.artifacts.files import sha256_of
from grpo.config import GenerateConfig
from grpo.errors import UsageError
from grpo.generate.engines.choice import choose_engine, default_dtype
from grpo.generate.engines.protocol import Engine
from grpo.generate.rounds import (
    all_shards,
    another_round,
    check_same_prompts,
    keep_rounds,
    rounds_to_hold,
    shards_of_round,
)
from grpo.generate.sampling import (
    Sampler,
    Work,
    drawn_digest,
    draws_of,
    requests_of,
    sample,
    sampling_of,
    shard_names,
)
from grpo.generate.selection import KEY, past_tables, select
from grpo.generate.weight_sync import Handover
from grpo.models.weight_check import LENGTH
from grpo.prompts.chat import chat_of
from grpo.prompts.table import HELD_OUT

NAME = "generate"
OUTPUT = "rollouts"
STAGE_VERSION = 3  # 3: the built-in engine adds up attention otherwise, which may change bits


def plan(run: Run, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when prompts or policy are missing."""
    config = run.config.generate
    run.require("prompts", None, "grpo run")
    if iteration > 0:
        run.require("update", iteration - 1, f"grpo update --iteration {iteration - 1}")
    references, sources = ["prompts", f"policy@{iteration}"], {}
    if config.prompts_sql is not None:
        references += past_tables(run, iteration)
        sources[KEY] = sha256_of(sql.user_file(run, KEY, config.prompts_sql))
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config={"seed": run.config.seed, "generate": described(config)},
        reads={reference: run.id_of(reference) or "" for reference in references},
        sources=sources,
        shards=shards_of_round(config),
    )


def described(config: GenerateConfig) -> dict[str, Any]:
    """Every key of the section, with the engine that is taken and what it computes in."""
    values = {**config.model_dump(), "engine": choose_engine(config.engine)[0]}
    if values["engine"] == "vllm":
        values["engine_options"] = {"dtype": default_dtype(), **config.engine_options}
    return values


@contextmanager
def open_tool(run: Run) -> Iterator[Sampler]:
    """Choose the engine; it is opened when the first iteration needs it."""
    from grpo.models.loading import best_device, context_length, load_config, load_tokenizer

    name, why = choose_engine(run.config.generate.engine)
    if name != "vllm" and (truncated := run.config.generate.truncation()):
        raise UsageError(f"generate.{truncated}: needs engine: vllm, but {name} is taken ({why})")
    device = best_device()
    run.console.say(f"engine: {name} on {device} ({why})")
    if name != "vllm" and run.config.generate.engine_options:
        run.console.say("generate.engine_options: are vLLM's; the built-in engine has none")
    start = run.policy_folder(0)
    config = load_config(start)
    engine = make_engine(run.config.generate, name, device, context_length(config), _longest_prompt(run))
    vocabulary = config.get_text_config().vocab_size
    handover = Handover(engine, device, run.console.say)
    try:
        yield Sampler(engine, handover, load_tokenizer(start), vocabulary, run.read("prompts", None))
    finally:
        engine.close()


def _longest_prompt(run: Run) -> int:
    """Tokens of the longest prompt; of held-out ones with what they are given more than max_new_tokens."""
    longest = int(run.require("prompts", None, "grpo run").summary["longest_prompt_tokens"])
    held_out = run.manifest(HELD_OUT, None) if run.config.evaluate else None
    if held_out is None or run.config.evaluate is None:
        return longest
    given = run.config.generate.max_new_tokens
    more = (run.config.evaluate.max_new_tokens or given) - given
    return max(longest, int(held_out.summary["longest_prompt_tokens"]) + more)


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
        from grpo.generate.engines.transformers_engine import TransformersEngine

        return TransformersEngine(device, config.max_rows_per_batch)
    from grpo.generate.engines.vllm_engine import VllmEngine

    # A probe is scored by sampling one token behind it.
    needed = max(longest_prompt + config.max_new_tokens, LENGTH + 1)
    return VllmEngine(config.engine_options, needed if context is None else min(needed, context))


def run(run: Run, iteration: int, staging: Staging, tool: Sampler) -> Manifest:
    """Sample what is not committed yet, shard by shard, and commit `rollouts` of one iteration."""
    before = run.manifest(OUTPUT, iteration)
    rounds = rounds_to_hold(run, staging.plan, before)
    if why := another_round(run, staging.plan, before):
        run.console.say(f"generate {iteration}: {why}: round {rounds - 1}")
    with staging.clock("prompts"):
        work = _work(run, iteration, tool, rounds)
    names = shard_names(staging, work)
    with staging.clock("write"):
        keep_rounds(run, staging, before, names)
    check_same_prompts(staging, names, [drawn_digest(work.draws, groups) for groups in work.shards])
    held, engine = sample(run, staging, tool, work)
    by_query = work.draws.by_query
    drawn = {"rounds": rounds} | ({} if by_query is None else {"groups_by_query": by_query})
    return staging.commit({OUTPUT: id_of(held)}, held, {**_summary(held), **drawn, **engine})


def _work(run: Run, iteration: int, tool: Sampler, rounds: int) -> Work:
    config = run.config.generate
    chosen = select(run, iteration, rounds, tool.prompts)
    if chosen.by_query is not None and chosen.by_query < len(chosen.rows):
        run.console.say(
            f"generate {iteration}: {KEY} gives prompts for {chosen.by_query} of {len(chosen.rows)} groups;"
            " the rest is drawn by a seeded permutation"
        )
    chat = chat_of(run.config.prompts, run.imports)
    draws = draws_of(tool.prompts.take(chosen.rows).to_pylist(), tool, chat, chosen.by_query)
    return Work(
        table=OUTPUT,
        prefix="part",
        policy=iteration,
        draws=draws,
        requests=requests_of(draws, run.config.seed, iteration, config.samples_per_prompt),
        shards=all_shards(config, rounds),
        groups_per_round=config.prompts_per_iteration,
        sampling=sampling_of(config, config.temperature, config.max_new_tokens),
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
