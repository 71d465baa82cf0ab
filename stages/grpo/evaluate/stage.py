"""evaluate: policy + eval_prompts -> eval_rollouts, eval_rewards, both in one output.

By the engine, the weight_sync and the rewards of training. Every held-out prompt is sampled, with the same
seeds for each policy: what changes is the policy. No stage reads the result, so it makes nothing stale.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyarrow as pa

from grpo import sql
from grpo.advantage import plan as advantage
from grpo.artifacts import ActiveRun, FileRecord, Manifest, Product, Staging, best_of, id_of, lacking
from grpo.evaluate.plan import JUDGEMENTS, OUTPUT, REWARDS, ROLLOUTS, SEEDS, config_of, settings
from grpo.generate import plan as generate
from grpo.generate import sampling
from grpo.generate.rollouts import SamplingTask
from grpo.prompts.chat import chat_of
from grpo.prompts.rendering import with_texts
from grpo.prompts.table import HELD_OUT
from grpo.score import plan as score
from grpo.score import stage as scoring
from grpo.score.scorers import check_columns, models_here
from grpo.score.shard import ScoringTask, read, staged
from grpo.update import plan as update

Resources = Callable[..., Any]
"""What the stages keep open, as pipeline/resources.py lends it: an evaluation opens nothing of its own."""


def check(run: ActiveRun, until: int, resources: Resources) -> None:
    """Raise UsageError (exit 2) for a reward that cannot do with the columns of the held-out prompts."""
    check_columns(run, resources(score.NAME).pool, run.read(HELD_OUT, None))


def open_resource(run: ActiveRun, lend: object) -> AbstractContextManager[None]:
    """Nothing of its own: it is given what the stages keep open."""
    return nullcontext()


def release(opened: Resources) -> None:
    """The stages' own."""


def after(run: ActiveRun, manifest: Manifest, opened: Resources) -> None:
    """Have the policy on disk where it is the best so far, which `checkpoints.keep_best` keeps.

    Raises EngineError (exit 8) for committed rows that failed, unless `score.on_error` is drop.
    """
    policy = manifest.iteration
    if policy and run.config.checkpoints.keep_best:
        best = best_of(run, run.evaluations())
        if best is not None and best.policy == policy:
            opened(update.NAME, beside=True).keep(policy)
    scoring.raise_for_failed(run, f"evaluate: policy {manifest.iteration}", REWARDS, manifest)


def produce(run: ActiveRun, policy: int, staging: Staging, resources: Resources) -> Product:
    """The evaluation of one policy: what of it is not committed yet is sampled and scored."""
    before = run.manifest(OUTPUT, policy)
    prompts = run.read(HELD_OUT, None)
    if before is not None and lacking(run, before) and staging.plan.same_as(before):
        # Its rewards failed: only those are computed again, over the same rollouts.
        sampled = [record for record in before.files if record.table == ROLLOUTS]
        sampling.keep_shards(run, staging, sampled, ROLLOUTS)
    sampler = resources(generate.NAME)
    with staging.clock("prompts"):
        task = _sampled(run, policy, staging, prompts, sampler)
    rollouts, engine = sampling.sample(run, staging, sampler, task).wait()
    # A reward model here takes the engine's place on the accelerator; all else leaves it where it is.
    scorers = resources(score.NAME, beside=not models_here(run.config))
    files = staged(staging, rollouts, ROLLOUTS)
    prompts_id = staging.plan.user_files["evaluate.prompts"]
    wanted = ScoringTask(staging, REWARDS, JUDGEMENTS, REWARDS, policy, files, prompts_id)
    rewards = scoring.score(run, scorers._replace(prompts=prompts), wanted)
    held = [*rollouts, *rewards]
    with staging.clock("measure"):
        measured = measure(run, policy, staging, held, resources(advantage.NAME, beside=True).connection)
    summary = {**measured, **scoring.summary_of(run, rewards), **engine}
    return Product({OUTPUT: id_of(held)}, held, summary)


def _sampled(
    run: ActiveRun, policy: int, staging: Staging, prompts: pa.Table, sampler: sampling.Sampler
) -> SamplingTask:
    wanted, config, stop = settings(run), run.config.generate, run.console.stop_requested
    chat = chat_of(config_of(run).prompts, run.imports)
    rows = with_texts(prompts, sampler.tokenizer, chat, stop).to_pylist()
    texts, requests = sampling.requests_of(
        rows, sampler, chat, run.config.seed, SEEDS, wanted["samples_per_prompt"]
    )
    return SamplingTask(
        table=ROLLOUTS,
        iteration=policy,
        policy=policy,
        rows=dict(enumerate(rows)),
        texts=dict(enumerate(texts)),
        requests=dict(enumerate(requests)),
        shards={
            staging.file_name(ROLLOUTS, index): range(*shard)
            for index, shard in enumerate(staging.plan.shards)
        },
        groups_per_round=len(requests),
        sampling=sampling.sampling_of(config, wanted["temperature"], wanted["max_new_tokens"]),
    )


def measure(
    run: ActiveRun, policy: int, staging: Staging, held: list[FileRecord], connection: sql.Connection
) -> dict[str, Any]:
    """The row of `evals` of what is staged: the same SQL that everyone asks later, over the same files."""
    row = {"iteration": policy, "same_prompts": True, **settings(run)}
    views = {table: read(run, table, staged(staging, held, table)) for table in (ROLLOUTS, REWARDS)}
    views["_eval_settings"] = pa.Table.from_pylist([row], schema=sql.SETTINGS)
    sql.show_iteration(connection, policy)
    for view, data in views.items():
        sql.register(connection, f"_{view}_0", data)
    found = sql.query(connection, "select * exclude (run, iteration, pass_reward, pass_threshold) from evals")
    [values] = found.to_pylist(maps_as_pydicts="strict")
    return {
        name: {str(key): each for key, each in value.items()} if isinstance(value, dict) else value
        for name, value in values.items()
    }
