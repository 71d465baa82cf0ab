"""evaluation: policy + eval_prompts -> eval_rollouts, eval_rewards, both in one output.

By the engine, the handover and the rewards of training, whose tools it borrows. What differs is what is
sampled: every held-out prompt, with seeds that are the same for each policy, so that what changes from one
policy to the next is the policy. Nothing reads the result, so it never makes anything stale.
"""

from dataclasses import replace
from typing import Any, Protocol

import pyarrow as pa

from grpo import sql, tables
from grpo.artifacts import EVALUATION, FileRecord, Manifest, Plan, Run, Staging, id_of
from grpo.artifacts.files import sha256_of
from grpo.config import EvaluateConfig
from grpo.errors import EngineError, UsageError
from grpo.generate import sampling
from grpo.generate import stage as generate
from grpo.prompts.chat import chat_of, template_path
from grpo.prompts.table import HELD_OUT, described
from grpo.score import stage as score
from grpo.score.scorers import Scorers, columns_of, rubric_of, spec_of
from grpo.score.shard import STAGE_VERSION as SCORE_VERSION
from grpo.score.shard import Work

NAME = "evaluate"
OUTPUT = EVALUATION
STAGE_VERSION = 1
ROLLOUTS, REWARDS, JUDGEMENTS = "eval_rollouts", "eval_rewards", "eval_judgements"
SEEDS = "evaluation"  # in the place of an iteration's number: no seed of training is made of it
# What of `generate` an evaluation depends on; the rest says what is sampled in training.
_OF_ENGINE = ("engine", "engine_options", "top_p", "top_k", "min_p", "max_rows_per_batch")


class Borrowed(Protocol):
    """How the tools of the stages are come by."""

    def __call__(self, stage: str, beside: bool = False) -> Any:
        """The tool of a stage. beside: it needs no accelerator, so that whoever is there may stay."""


def config_of(run: Run) -> EvaluateConfig:
    """The section. Raises UsageError (exit 2) where there is none."""
    if run.config.evaluate is None:
        raise UsageError("evaluate: is not configured; say in `evaluate.prompts.source` what to measure with")
    return run.config.evaluate


def settings(run: Run) -> dict[str, Any]:
    """What is sampled and what passes, every null resolved."""
    config, sampled = config_of(run), run.config.generate
    given = {"temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
    return {
        "samples_per_prompt": config.samples_per_prompt,
        **{key: getattr(sampled, key) if value is None else value for key, value in given.items()},
        "pass_reward": config.pass_reward or run.config.score.rewards[0].name,
        "pass_threshold": config.pass_threshold,
    }


def plan(run: Run, policy: int) -> Plan:
    """What an evaluation of `policy` would do now. Raises InputError (exit 4) where it is not there.

    The prompts count as a source, not as something read: other prompts make what was measured with the old
    ones differ, as any change of the configuration does, and not stale.
    """
    config = config_of(run)
    prompts = run.require(HELD_OUT, None, "grpo run")
    if policy > 0:
        run.require("update", policy - 1, f"grpo update --iteration {policy - 1}")
    sampled = generate.described(run.config.generate)
    size = run.config.generate.rollouts_per_shard
    sources = {**score.sources_of(run), "evaluate.prompts": prompts.ids[HELD_OUT]}
    if path := template_path(config.prompts, run.imports):
        chat_of(config.prompts, run.imports)  # says so where the file cannot be read
        sources["evaluate.prompts.chat_template"] = sha256_of(path)
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=policy,
        config={
            "seed": run.config.seed,
            "evaluate": {**settings(run), "prompts": described(run, HELD_OUT)},
            "generate": {"version": generate.STAGE_VERSION, **{key: sampled[key] for key in _OF_ENGINE}},
            "score": {"version": SCORE_VERSION, "rewards": score.described(run)},
        },
        reads={f"policy@{policy}": run.id_of(f"policy@{policy}") or ""},
        sources=sources,
        shards=sampling.shards_of(prompts.rows, config.samples_per_prompt, size),
    )


def check(run: Run, scorers: Scorers) -> None:
    """Raise UsageError (exit 2) for a reward that cannot do with the columns of the held-out prompts."""
    columns = columns_of(run.read(HELD_OUT, None))
    for reward in run.config.score.rewards:
        if reward.function is not None:
            scorers.pool.check(spec_of(reward), columns)
        if reward.judge is not None:
            rubric_of(run, reward, columns)


def run(run: Run, policy: int, staging: Staging, tools: Borrowed) -> Manifest:
    """Sample and score what is not committed yet, and commit the evaluation of one policy.

    Raises EngineError (exit 8) after the commit when rewards failed and `score.on_error` is stop.
    """
    before = run.manifest(OUTPUT, policy)
    prompts = run.read(HELD_OUT, None)
    if before is not None and run.partial(before) and staging.plan.same_as(before):
        _keep_rollouts(run, policy, staging, before)
    sampler = tools(generate.NAME)
    with staging.clock("prompts"):
        work = _sampled(run, policy, staging, prompts, sampler)
    rollouts, engine = sampling.sample(run, staging, sampler, work)
    # A reward model takes the engine's place on the accelerator; functions leave it where it is.
    scorers = tools(score.NAME, beside=all(reward.model is None for reward in run.config.score.rewards))
    scorers = replace(scorers, prompts=prompts, columns=columns_of(prompts))
    files = [(record, staging.folder / record.name) for record in rollouts]
    prompts_id = staging.plan.sources["evaluate.prompts"]
    _, rewards = score.score(
        run, staging, scorers, Work(REWARDS, JUDGEMENTS, REWARDS, policy, files, prompts_id, before)
    )
    held = [*rollouts, *rewards]
    with staging.clock("measure"):
        summary = {**measure(run, policy, staging, held), **score.summary_of(run, rewards), **engine}
    manifest = staging.commit({OUTPUT: id_of(held)}, held, summary)
    if run.partial(manifest):
        raise EngineError(score.complaint(run, f"evaluate: policy {policy}", REWARDS, manifest))
    return manifest


def _keep_rollouts(run: Run, policy: int, staging: Staging, before: Manifest) -> None:
    """Of an evaluation whose rewards failed: only those are computed again, over the same rollouts."""
    sampled = [record for record in before.files if record.table == ROLLOUTS]
    for index, record in enumerate(sampled):
        name = staging.file_name(ROLLOUTS, index)
        if staging.committed(name) is None:
            staging.link_table(record, run.path_of(record, OUTPUT, policy), name)


def _sampled(
    run: Run, policy: int, staging: Staging, prompts: pa.Table, sampler: sampling.Sampler
) -> sampling.Work:
    wanted = settings(run)
    draws = sampling.draws_of(prompts.to_pylist(), sampler, chat_of(config_of(run).prompts, run.imports))
    requests = sampling.requests_of(draws, run.config.seed, SEEDS, wanted["samples_per_prompt"])
    how = sampling.sampling_of(run.config.generate, wanted["temperature"], wanted["max_new_tokens"])
    return sampling.Work(
        table=ROLLOUTS,
        prefix=ROLLOUTS,
        policy=policy,
        draws=draws,
        requests=requests,
        shards=[range(first, end) for first, end in staging.plan.shards],
        groups_per_round=len(requests),
        sampling=how,
    )


def measure(run: Run, policy: int, staging: Staging, held: list[FileRecord]) -> dict[str, Any]:
    """The row of `evals` of what is staged: the same SQL that everyone asks later, over the same files."""
    wanted = settings(run)
    row = {"iteration": policy, "same_prompts": True, **wanted}
    found = {"_eval_settings": pa.Table.from_pylist([row], schema=sql.SETTINGS)}
    for table in (ROLLOUTS, REWARDS):
        records = [(record, staging.folder / record.name) for record in held if record.table == table]
        for record, path in records:
            run.verify(record, path)
        found[table] = tables.decode(table, ((path, path.read_bytes()) for _, path in records))
    with sql.connect([run], policy, ()) as connection:
        for view, data in found.items():
            sql.register(connection, f"_{view}_0", data)
        [values] = sql.query(connection, "select * exclude (run, iteration) from evals").to_pylist(
            maps_as_pydicts="strict"
        )
    return {
        name: {str(key): each for key, each in value.items()} if isinstance(value, dict) else value
        for name, value in values.items()
    }
