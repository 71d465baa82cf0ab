"""generate: policy + prompts -> rollouts.

Samples K responses per prompt and stores the log-probs they were sampled with: pi_old of the ratio, never
guessed later. Shards are committed one by one, and a committed shard is never sampled again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grpo.artifacts import ActiveRun, FileRecord, Manifest, Product, Run, Staging, id_of, policy_of
from grpo.config import GenerateConfig
from grpo.errors import UsageError
from grpo.generate import selection
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.protocol import Engine
from grpo.generate.plan import KEY, OUTPUT
from grpo.generate.rounds import (
    all_shards,
    another_round,
    check_same_prompts,
    keep_rounds,
    rounds_to_hold,
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
from grpo.generate.weight_sync import WeightSync
from grpo.models.loading import best_device, context_length, load_config, load_tokenizer
from grpo.models.weight_check import LENGTH
from grpo.prompts.chat import chat_of
from grpo.prompts.table import HELD_OUT


def check(run: ActiveRun, until: int, resources: object) -> None:
    """Raise UsageError (exit 2) for a `generate.prompts_sql` that cannot be run."""
    selection.check(run)


@contextmanager
def open_resource(run: ActiveRun) -> Iterator[Sampler]:
    """Choose the engine; it is opened when the first iteration needs it."""
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
    weight_sync = WeightSync(engine, device, run.console.say)
    try:
        yield Sampler(engine, weight_sync, load_tokenizer(start), vocabulary, run.read("prompts", None))
    finally:
        engine.close()


def _longest_prompt(run: ActiveRun) -> int:
    """Tokens of the longest prompt; of held-out ones with what they are given more than max_new_tokens."""
    longest = int(run.require("prompts", None, "grpo run").summary["longest_prompt_tokens"])
    held_out = run.manifest(HELD_OUT, None) if run.config.evaluate else None
    if held_out is None or run.config.evaluate is None:
        return longest
    given = run.config.generate.max_new_tokens
    more = (run.config.evaluate.max_new_tokens or given) - given
    return max(longest, int(held_out.summary["longest_prompt_tokens"]) + more)


def release(sampler: Sampler) -> None:
    """Leave the accelerator to the next stage."""
    sampler.weight_sync.release()


def after(run: Run, manifest: Manifest, sampler: Sampler) -> None:
    """Nothing follows from committed rollouts."""


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

    # A weight check is scored by sampling one token behind it.
    needed = max(longest_prompt + config.max_new_tokens, LENGTH + 1)
    return VllmEngine(config.engine_options, needed if context is None else min(needed, context))


def produce(run: ActiveRun, iteration: int, staging: Staging, sampler: Sampler) -> Product:
    """The `rollouts` of one iteration: what of them is not committed yet is sampled, shard by shard."""
    before = run.manifest(OUTPUT, iteration)
    rounds = rounds_to_hold(run, staging.plan, before)
    if why := another_round(run, staging.plan, before):
        run.console.say(f"generate {iteration}: {why}: round {rounds - 1}")
    with staging.clock("prompts"):
        work = _work(run, iteration, sampler, rounds)
    names = shard_names(staging, work)
    with staging.clock("write"):
        keep_rounds(run, staging, before, names)
    check_same_prompts(staging, names, [drawn_digest(work.draws, groups) for groups in work.shards])
    held, engine = sample(run, staging, sampler, work)
    by_query = work.draws.by_query
    drawn = {"rounds": rounds} | ({} if by_query is None else {"groups_by_query": by_query})
    return Product({OUTPUT: id_of(held)}, held, {**_summary(held), **drawn, **engine})


def _work(run: ActiveRun, iteration: int, sampler: Sampler, rounds: int) -> Work:
    config = run.config.generate
    chosen = selection.select(run, iteration, rounds, sampler.prompts)
    if chosen.by_query is not None and chosen.by_query < len(chosen.rows):
        run.console.say(
            f"generate {iteration}: {KEY} gives prompts for {chosen.by_query} of {len(chosen.rows)} groups;"
            " the rest is drawn by a seeded permutation"
        )
    chat = chat_of(run.config.prompts, run.imports)
    draws = draws_of(sampler.prompts.take(chosen.rows).to_pylist(), sampler, chat, chosen.by_query)
    return Work(
        table=OUTPUT,
        prefix="part",
        iteration=iteration,
        policy=policy_of(iteration),
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
