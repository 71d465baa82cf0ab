"""evaluation: policy + eval_prompts -> eval_rollouts, eval_rewards, both in one output.

By the engine, the weight_sync and the rewards of training, whose tools it borrows. What differs is what is
sampled: every held-out prompt, with seeds that are the same for each policy, so that what changes from one
policy to the next is the policy. Nothing reads the result, so it never makes anything stale.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import pyarrow as pa

from grpo import sql, tables
from grpo.advantage import plan as advantage
from grpo.artifacts import ActiveRun, FileRecord, Manifest, Product, Run, Staging, id_of, lacking
from grpo.errors import EngineError
from grpo.evaluate.plan import JUDGEMENTS, OUTPUT, REWARDS, ROLLOUTS, SEEDS, config_of, settings
from grpo.generate import plan as generate
from grpo.generate import sampling
from grpo.prompts.chat import chat_of
from grpo.prompts.table import HELD_OUT
from grpo.score import plan as score
from grpo.score import stage as scoring
from grpo.score.judge.rubric import rubric_of
from grpo.score.scorers import Scorers, columns_of, spec_of
from grpo.score.shard import File, Work


class Resources(Protocol):
    """What the stages keep open: an evaluation opens nothing of its own."""

    def __call__(self, stage: str, beside: bool = False) -> Any:
        """The resource of a stage. beside: it needs no accelerator, so that whoever is there may stay."""


def check(run: ActiveRun, until: int, resources: Resources) -> None:
    """Raise UsageError (exit 2) for a reward that cannot do with the columns of the held-out prompts."""
    scorers: Scorers = resources(score.NAME)
    columns = columns_of(run.read(HELD_OUT, None))
    for reward in run.config.score.rewards:
        if reward.function is not None:
            scorers.pool.check(spec_of(reward), columns)
        if reward.judge is not None:
            rubric_of(reward, run.imports, columns)


def open_resource(run: Run) -> AbstractContextManager[None]:
    """Nothing of its own: it is given what the stages keep open."""
    return nullcontext()


def release(opened: Resources) -> None:
    """The stages' own."""


def after(run: ActiveRun, manifest: Manifest, opened: Resources) -> None:
    """Raise EngineError (exit 8) for committed rows that failed, unless `score.on_error` is drop."""
    if lacking(run, manifest):
        raise EngineError(scoring.complaint(run, f"evaluate: policy {manifest.iteration}", REWARDS, manifest))


def produce(run: ActiveRun, policy: int, staging: Staging, resources: Resources) -> Product:
    """The evaluation of one policy: what of it is not committed yet is sampled and scored."""
    before = run.manifest(OUTPUT, policy)
    prompts = run.read(HELD_OUT, None)
    if before is not None and lacking(run, before) and staging.plan.same_as(before):
        _keep_rollouts(run, policy, staging, before)
    sampler = resources(generate.NAME)
    with staging.clock("prompts"):
        work = _sampled(run, policy, staging, prompts, sampler)
    rollouts, engine = sampling.sample(run, staging, sampler, work)
    # A reward model takes the engine's place on the accelerator; functions leave it where it is.
    scorers = resources(score.NAME, beside=all(reward.model is None for reward in run.config.score.rewards))
    scorers = replace(scorers, prompts=prompts, columns=columns_of(prompts))
    files = [File(record, staging.folder / record.name) for record in rollouts]
    prompts_id = staging.plan.user_files["evaluate.prompts"]
    _, rewards = scoring.score(
        run, staging, scorers, Work(REWARDS, JUDGEMENTS, REWARDS, policy, files, prompts_id, before)
    )
    held = [*rollouts, *rewards]
    with staging.clock("measure"):
        measured = measure(run, policy, staging, held, resources(advantage.NAME, beside=True))
    summary = {**measured, **scoring.summary_of(run, rewards), **engine}
    return Product({OUTPUT: id_of(held)}, held, summary)


def _keep_rollouts(run: Run, policy: int, staging: Staging, before: Manifest) -> None:
    """Of an evaluation whose rewards failed: only those are computed again, over the same rollouts."""
    sampled = [record for record in before.files if record.table == ROLLOUTS]
    for index, record in enumerate(sampled):
        name = staging.file_name(ROLLOUTS, index)
        if staging.committed(name) is None:
            staging.link_table(record, run.path_of(record, OUTPUT, policy), name)


def _sampled(
    run: ActiveRun, policy: int, staging: Staging, prompts: pa.Table, sampler: sampling.Sampler
) -> sampling.Work:
    wanted = settings(run)
    draws = sampling.draws_of(prompts.to_pylist(), sampler, chat_of(config_of(run).prompts, run.imports))
    requests = sampling.requests_of(draws, run.config.seed, SEEDS, wanted["samples_per_prompt"])
    how = sampling.sampling_of(run.config.generate, wanted["temperature"], wanted["max_new_tokens"])
    return sampling.Work(
        table=ROLLOUTS,
        prefix=ROLLOUTS,
        iteration=policy,
        policy=policy,
        draws=draws,
        requests=requests,
        shards=[range(first, end) for first, end in staging.plan.shards],
        groups_per_round=len(requests),
        sampling=how,
    )


def measure(
    run: ActiveRun, policy: int, staging: Staging, held: list[FileRecord], connection: sql.Connection
) -> dict[str, Any]:
    """The row of `evals` of what is staged: the same SQL that everyone asks later, over the same files."""
    wanted = settings(run)
    row = {"iteration": policy, "same_prompts": True, **wanted}
    found = {"_eval_settings": pa.Table.from_pylist([row], schema=sql.SETTINGS)}
    for table in (ROLLOUTS, REWARDS):
        records = [(record, staging.folder / record.name) for record in held if record.table == table]
        for record, path in records:
            run.verify(record, path)
        found[table] = tables.decode(table, ((path, path.read_bytes()) for _, path in records))
    sql.turn_to(connection, policy)
    for view, data in found.items():
        sql.register(connection, f"_{view}_0", data)
    [values] = sql.query(connection, "select * exclude (run, iteration) from evals").to_pylist(
        maps_as_pydicts="strict"
    )
    return {
        name: {str(key): each for key, each in value.items()} if isinstance(value, dict) else value
        for name, value in values.items()
    }
