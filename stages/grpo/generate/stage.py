"""generate: policy + prompts -> rollouts.

Samples K responses per prompt and stores the log-probs they were sampled with: pi_old of the ratio, never
guessed later. Shards are committed one by one, and a committed shard is never sampled again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from grpo.artifacts import (
    ActiveRun,
    Manifest,
    Plan,
    Product,
    Staging,
    id_of,
    keep_source,
    lacking,
    num_rounds,
    policy_of,
)
from grpo.config import GenerateConfig
from grpo.config.named_files import named_file
from grpo.errors import DataError, UsageError
from grpo.generate import selection
from grpo.generate.engine_pool import open_engines
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.protocol import Engine
from grpo.generate.plan import KEY, OUTPUT
from grpo.generate.rollouts import SamplingTask
from grpo.generate.sampling import Sampled, Sampler, keep_shards, requests_of, sample, sampling_of
from grpo.generate.weight_sync import WeightSync
from grpo.models.loading import best_device, context_length, load_config, load_tokenizer
from grpo.models.weight_check import LENGTH
from grpo.models.weights import Lend
from grpo.prompts.chat import chat_of
from grpo.prompts.rendering import with_texts
from grpo.prompts.table import HELD_OUT
from grpo.sql import UserSql

PREFIX = "part"  # of the names of shards


def check(run: ActiveRun, until: int, resources: object) -> None:
    """Raise UsageError (exit 2) for a `generate.prompts_sql` that cannot be run."""
    selection.check(run)


@contextmanager
def open_resource(run: ActiveRun, lend: Lend) -> Iterator[Sampler]:
    """Choose the engine; it is opened when the first iteration needs it. lend: gives it its policies."""
    settings = run.config.generate
    name, why = choose_engine(settings.engine)
    if name != "vllm" and (truncated := settings.truncation()):
        raise UsageError(f"generate.{truncated}: needs engine: vllm, but {name} is taken ({why})")
    device = best_device()
    run.console.say(f"engine: {name} on {device} ({why})")
    if name != "vllm" and settings.engine_options:
        run.console.say("generate.engine_options: are vLLM's; the built-in engine has none")
    start = run.start["policy"]
    config, attention = load_config(start), run.config.model_options.attn_implementation
    making = partial(
        make_engine, settings, name, device, context_length(config), _longest_prompt(run), attention
    )
    engine = making()
    vocabulary = config.get_text_config().vocab_size
    weight_sync = WeightSync(engine, run.console.say, attention)
    tokenizer, chat = load_tokenizer(start), chat_of(run.config.prompts, run.imports)
    prompts = with_texts(run.read("prompts", None), tokenizer, chat, run.console.stop_requested)
    elsewhere = open_engines(run, making, name, device)
    try:
        with UserSql(run.console.stop_requested) as user_sql:
            yield Sampler(engine, weight_sync, tokenizer, vocabulary, prompts, user_sql, lend, elsewhere)
    finally:
        engine.close()
        if elsewhere is not None:
            elsewhere.close()


def _longest_prompt(run: ActiveRun) -> int:
    """Tokens of the longest prompt; of held-out ones with what they are given more than max_new_tokens."""
    longest = int(run.require("prompts", None, "grpo run").summary["longest_prompt_tokens"])
    if (evaluate := run.config.evaluate) and (held_out := run.manifest(HELD_OUT, None)):
        given = run.config.generate.max_new_tokens
        more = (evaluate.max_new_tokens or given) - given
        longest = max(longest, int(held_out.summary["longest_prompt_tokens"]) + more)
    return longest


def make_engine(
    config: GenerateConfig,
    name: str,
    device: str,
    context: int | None,
    longest_prompt: int,
    attention: str = "auto",
    transfer: str | None = None,
) -> Engine:
    """The engine `name` with nothing loaded yet; context: positions the model has, longest_prompt: tokens.

    transfer: as VllmEngine takes it.

    Raises EngineError or UsageError where vLLM is not what is needed, or not given what it knows.
    """
    if name == "transformers":
        from grpo.generate.engines.transformers_engine import TransformersEngine

        return TransformersEngine(device, config.max_rows_per_batch, attention)
    from grpo.generate.engines.vllm_engine import VllmEngine

    # A weight check is scored by sampling one token behind it.
    needed = max(longest_prompt + config.max_new_tokens, LENGTH + 1)
    return VllmEngine(
        config.engine_options,
        needed if context is None else min(needed, context),
        reads_text=bool(config.stop) or config.structured_outputs is not None,
        transfer=transfer,
    )


def release(sampler: Sampler) -> None:
    """Leave the accelerator to the next stage."""
    sampler.weight_sync.release()


def after(run: ActiveRun, manifest: Manifest, sampler: Sampler) -> None:
    """Nothing follows from committed rollouts."""


def produce(run: ActiveRun, iteration: int, staging: Staging, sampler: Sampler) -> Product:
    """The `rollouts` of one iteration: what of them is not committed yet is sampled, shard by shard."""
    return finish(begin(run, iteration, staging, sampler))


def begin(run: ActiveRun, iteration: int, staging: Staging, sampler: Sampler) -> Sampled:
    """Have them sampled; by engines in other processes, this only begins it.

    generate.dynamic_sampling asks for another round of prompts where too few groups have signal: a new
    attempt at the same plan, which keeps the shards of the rounds before and samples its own.
    """
    if run.config.generate.prompts_sql is not None:
        path = named_file(run.imports, KEY, run.config.generate.prompts_sql)
        keep_source(run, staging.plan.user_files[KEY], path.name, path.read_bytes)
    before = run.manifest(OUTPUT, iteration)
    rounds, why = _rounds_to_hold(run, staging.plan, before)
    if why and before is not None:
        run.console.say(f"generate {iteration}: {why}: round {rounds - 1}")
        with staging.clock("write"):
            keep_shards(run, staging, before.files, PREFIX)
    with staging.clock("prompts"):
        task = _task(run, iteration, staging, sampler, rounds)
    _check_same_prompts(staging, task)
    return sample(run, staging, sampler, task)


def finish(sampled: Sampled) -> Product:
    """The `rollouts` that were begun, when all are there."""
    task, (held, engine) = sampled.task, sampled.wait()
    rollouts = sum(record.rows or 0 for record in held)
    tokens = sum(record.labels["response_tokens"] for record in held)
    truncated = sum(record.labels["truncated"] for record in held)
    summary = {
        "rollouts": rollouts,
        "response_tokens": tokens,
        "mean_response_tokens": tokens / rollouts,
        "truncated_fraction": truncated / rollouts,
        "policy_lag": task.iteration - task.policy,
        "rounds": len(task.requests) // task.groups_per_round,
    }
    if task.by_query is not None:
        summary["groups_by_query"] = task.by_query
    return Product({OUTPUT: id_of(held)}, held, summary | engine)


def _rounds_to_hold(run: ActiveRun, plan: Plan, before: Manifest | None) -> tuple[int, str]:
    """Rounds that the output holds once this attempt is done, and why it adds one to `before`, or nothing."""
    dynamic_sampling = run.config.generate.dynamic_sampling
    if dynamic_sampling is None:
        return 1, ""
    if before is None:
        # Where rollouts were lost, the rewards that were made from them say how many rounds they had.
        rewards = run.manifest("rewards", plan.iteration)
        had = int(rewards.summary.get("rounds", 1)) if rewards else 1
        return min(had, dynamic_sampling.max_rounds), ""
    if not plan.same_as(before):
        return 1, ""
    why = lacking(run, before)
    return num_rounds(before) + bool(why), why


def _task(run: ActiveRun, iteration: int, staging: Staging, sampler: Sampler, rounds: int) -> SamplingTask:
    config, size = run.config.generate, run.config.generate.prompts_per_iteration
    chosen, by_query = selection.select(run, iteration, rounds, sampler.prompts, sampler.user_sql)
    if by_query is not None and by_query < len(chosen):
        run.console.say(
            f"generate {iteration}: {KEY} gives prompts for {by_query} of {len(chosen)} groups;"
            " the rest is drawn by a seeded permutation"
        )
    rows = sampler.prompts.take(chosen).to_pylist()
    chat = chat_of(run.config.prompts, run.imports)
    texts, requests = requests_of(rows, sampler, chat, run.config.seed, iteration, config.samples_per_prompt)
    offsets = range(0, rounds * size, size)
    shards = [range(start + first, start + end) for start in offsets for first, end in staging.plan.shards]
    return SamplingTask(
        table=OUTPUT,
        iteration=iteration,
        policy=policy_of(iteration, config.policy_lag),
        rows=dict(enumerate(rows)),
        texts=dict(enumerate(texts)),
        requests=dict(enumerate(requests)),
        shards={staging.file_name(PREFIX, index): groups for index, groups in enumerate(shards)},
        groups_per_round=size,
        sampling=sampling_of(config, config.temperature, config.max_new_tokens),
        by_query=by_query,
    )


def _check_same_prompts(staging: Staging, task: SamplingTask) -> None:
    """Raise DataError (exit 3) where a shard that is there was drawn otherwise than it would be now."""
    for name, groups in task.shards.items():
        record, now = staging.committed(name), task.digest_of(groups)
        if record is not None and record.labels.get("prompts", now) != now:
            raise DataError(
                f"generate.prompts_sql: {staging.folder / name} holds other prompts than the query gives now;"
                " for the same tables it must always give the same, so nothing in it may ask for the time"
            )
