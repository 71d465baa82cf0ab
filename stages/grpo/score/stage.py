"""score: rollouts + prompts -> rewards.

One row per rollout and reward. A shard is one reward over one rollout shard: an unchanged reward is kept by
a hard link, a new weight rewrites its rows without scoring, and a reward added later scores only itself.
A rollout that cannot be scored is a row with a status, never a silent zero.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from grpo import tables
from grpo.artifacts import FileRecord, Manifest, Plan, Run, Staging, digest, id_of
from grpo.config import RewardConfig
from grpo.errors import EngineError
from grpo.score.call import FunctionSpec, GroupCall
from grpo.score.functions import FunctionPool, source_sha256
from grpo.score.outcome import Outcome

if TYPE_CHECKING:
    from grpo.score.reward_model import RewardModel

NAME = "score"
OUTPUT = "rewards"
STAGE_VERSION = 1
_FAILED = ("error", "timeout", "nonfinite")
_READ = ["group_id", "sample_id", "prompt_id", "response", "response_token_ids"]


@dataclass
class Scorers:
    """What stays open between iterations: worker processes, reward models, the prompts."""

    pool: FunctionPool
    prompts: pa.Table
    columns: list[str]
    models: "dict[str, RewardModel]" = field(default_factory=dict)


@dataclass(frozen=True)
class _Rollout:
    """What a reward sees of one rollout."""

    group_id: int
    sample_id: int
    prompt_id: int
    response: str
    response_token_ids: list[int]


def plan(run: Run, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when the rollouts are missing."""
    run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    rewards = run.config.score.rewards
    described = {reward.name: reward.model_dump(exclude={"name"}) for reward in rewards}
    references = (f"rollouts@{iteration}", "prompts")
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config={"score": {"rewards": described}},
        reads={reference: run.id_of(reference) or "" for reference in references},
        sources={f"score.rewards.{reward.name}": _source(run, reward) for reward in rewards},
    )


def _source(run: Run, reward: RewardConfig) -> str:
    """sha256 of the file the function is in (empty: built in), or the id of the reward model."""
    if reward.function is not None:
        return source_sha256(reward.function, run.imports)
    return run.checkpoint_id(str(reward.model))


@contextmanager
def open_tool(run: Run) -> Iterator[Scorers]:
    """Start the workers, load the reward models; UsageError (exit 2) for a function that is no use."""
    prompts = run.read("prompts", None)
    columns = [name for name in prompts.column_names if name not in ("prompt", "messages")]
    pool = FunctionPool(run.imports, run.config.score.workers)
    try:
        for reward in run.config.score.rewards:
            if reward.function is not None:
                pool.check(_spec(reward), columns)
        models = _open_models(run)
        yield Scorers(pool, prompts, columns, models)
    finally:
        pool.close()


def _open_models(run: Run) -> "dict[str, RewardModel]":
    rewards = [reward for reward in run.config.score.rewards if reward.model is not None]
    if not rewards:
        return {}
    from grpo.model import best_device
    from grpo.score.reward_model import RewardModel

    return {
        reward.name: RewardModel(run.checkpoint_path(str(reward.model)), best_device()) for reward in rewards
    }


def run(run: Run, iteration: int, staging: Staging, tool: Scorers) -> Manifest:
    """Score what is not scored yet and commit `rewards` of one iteration.

    Raises EngineError (exit 8) after the commit when rewards failed and `score.on_error` is stop.
    """
    rollouts = run.require("rollouts", iteration, "grpo generate")
    before = run.manifest(OUTPUT, iteration)
    redo_all = _asked_again(staging, before, run.partial(before))
    held: list[FileRecord] = []
    ids = {}
    for reward in run.config.score.rewards:
        own = []
        for shard in rollouts.files:
            name = staging.file_name("part", len(held))
            record = staging.committed(name)
            if record is None:
                unit = _unit(staging, reward, shard)
                old = None if redo_all or before is None else _find(before, unit)
                with staging.clock(reward.name):
                    record = _score_shard(run, iteration, staging, tool, reward, shard, old, name, unit)
                run.console.stop_requested()
            own.append(record)
            held.append(record)
        ids[f"reward/{reward.name}"] = id_of(own)
    statuses: Counter[str] = Counter()
    for record in held:
        statuses.update(record.labels["statuses"])
    failed = sum(statuses[status] for status in _FAILED)
    weights = {reward.name: reward.weight for reward in run.config.score.rewards}
    manifest = staging.commit(ids, held, {"failed": failed, "statuses": dict(statuses), "weights": weights})
    if run.partial(manifest):
        raise EngineError(_complaint(run, iteration, failed, statuses))
    return manifest


def _asked_again(staging: Staging, before: Manifest | None, partial: bool) -> bool:
    """Whether this is a `--force` with nothing changed: then every reward is computed anew."""
    again = before is not None and staging.attempt > before.attempt and staging.plan.same_as(before)
    return again and not partial


def _unit(staging: Staging, reward: RewardConfig, shard: FileRecord) -> str:
    """Digest of all that one reward over one rollout shard depends on. Not the weight or time-out."""
    described = reward.model_dump(exclude={"name", "weight", "timeout_s"})
    source = staging.plan.sources[f"score.rewards.{reward.name}"]
    return digest([STAGE_VERSION, described, source, shard.sha256, staging.plan.reads["prompts"]])


def _find(manifest: Manifest, unit: str) -> FileRecord | None:
    return next((file for file in manifest.files if file.unit == unit), None)


def _score_shard(
    run: Run,
    iteration: int,
    staging: Staging,
    tool: Scorers,
    reward: RewardConfig,
    shard: FileRecord,
    old: FileRecord | None,
    name: str,
    unit: str,
) -> FileRecord:
    """Commit one reward over one rollout shard, keeping what `old` already holds of it."""
    source = run.path_of(old, OUTPUT, iteration) if old is not None else None
    failed = old is not None and any(old.labels["statuses"].get(status) for status in _FAILED)
    same_name = old is not None and old.labels["reward"] == reward.name
    same_weight = old is not None and old.labels["weight"] == reward.weight
    if old is not None and source is not None and same_name and same_weight and not failed:
        return staging.link_table(old, source, name)
    path = run.path_of(shard, "rollouts", iteration)
    run.verify(shard, path)
    rollouts = [
        _Rollout(**row) for row in tables.decode("rollouts", [(path, path.read_bytes())], _READ).to_pylist()
    ]
    known: dict[tuple[int, int], Outcome] = {}
    if old is not None and source is not None:
        run.verify(old, source)
        for row in tables.decode(OUTPUT, [(source, source.read_bytes())]).to_pylist():
            if row["status"] not in _FAILED:
                known[row["group_id"], row["sample_id"]] = Outcome(row["value"], row["status"], row["error"])
    todo = [rollout for rollout in rollouts if (rollout.group_id, rollout.sample_id) not in known]
    with run.console.progress(f"score {iteration} {reward.name}", len(todo), "rollouts") as advance:
        for rollout, outcome in _score(run, tool, reward, todo):
            known[rollout.group_id, rollout.sample_id] = outcome
            advance(1)
    outcomes = [known[rollout.group_id, rollout.sample_id] for rollout in rollouts]
    data = _table(iteration, reward, rollouts, outcomes)
    statuses = dict(Counter(outcome.status for outcome in outcomes))
    return staging.write_table(
        OUTPUT, name, data, unit, reward=reward.name, weight=reward.weight, statuses=statuses
    )


def _score(
    run: Run, tool: Scorers, reward: RewardConfig, rollouts: list[_Rollout]
) -> Iterator[tuple[_Rollout, Outcome]]:
    """(rollout, outcome) of each rollout: a function gets one group per call, a model batches of tokens."""
    groups: dict[int, list[_Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group_id, []).append(rollout)
    rows = _prompts_of(tool, rollouts)
    calls = [_call(tool, rows, members) for members in groups.values()]
    if reward.function is not None:
        outcomes = tool.pool.score(_spec(reward), calls)
        for members, found in zip(groups.values(), outcomes, strict=True):
            yield from zip(members, found, strict=True)
    else:
        prompts = [prompt for call in calls for prompt in call.prompts]
        completions = [completion for call in calls for completion in call.completions]
        members = [rollout for group in groups.values() for rollout in group]
        limit = run.config.score.max_tokens_per_batch
        yield from zip(members, tool.models[reward.name].score(prompts, completions, limit), strict=True)


def _prompts_of(tool: Scorers, rollouts: list[_Rollout]) -> dict[int, dict[str, Any]]:
    """The rows of `prompts` that the rollouts need, by prompt_id."""
    wanted = np.unique([rollout.prompt_id for rollout in rollouts]).astype(np.int64)
    places = np.searchsorted(tool.prompts["prompt_id"].to_numpy(), wanted)  # the table is in this order
    return {row["prompt_id"]: row for row in tool.prompts.take(places).to_pylist()}


def _call(tool: Scorers, prompts: dict[int, dict[str, Any]], rollouts: list[_Rollout]) -> GroupCall:
    """A group as a reward function sees it; a chat prompt is messages, and so is its completion."""
    rows = [prompts[rollout.prompt_id] for rollout in rollouts]
    chat = [row["messages"] is not None for row in rows]
    return GroupCall(
        prompts=[row["messages"] if c else row["prompt"] for row, c in zip(rows, chat, strict=True)],
        completions=[
            [{"role": "assistant", "content": rollout.response}] if c else rollout.response
            for rollout, c in zip(rollouts, chat, strict=True)
        ],
        completion_ids=[rollout.response_token_ids for rollout in rollouts],
        columns={name: [row[name] for row in rows] for name in tool.columns},
    )


def _spec(reward: RewardConfig) -> FunctionSpec:
    return FunctionSpec(str(reward.function), reward.arguments, reward.timeout_s)


def _table(
    iteration: int, reward: RewardConfig, rollouts: list[_Rollout], outcomes: list[Outcome]
) -> pa.Table:
    columns = {
        "iteration": [iteration] * len(rollouts),
        "group_id": [rollout.group_id for rollout in rollouts],
        "sample_id": [rollout.sample_id for rollout in rollouts],
        "name": [reward.name] * len(rollouts),
        "value": [outcome.value for outcome in outcomes],
        "weight": [reward.weight] * len(rollouts),
        "status": [outcome.status for outcome in outcomes],
        "error": [outcome.error for outcome in outcomes],
    }
    return pa.table(columns, schema=tables.schema(OUTPUT))


def _complaint(run: Run, iteration: int, failed: int, statuses: Counter[str]) -> str:
    counts = ", ".join(f"{statuses[status]} {status}" for status in _FAILED if statuses[status])
    first = next(
        (row for row in run.read(OUTPUT, iteration, ["name", "status", "error"]).to_pylist() if row["error"]),
        {"name": "", "error": ""},
    )
    return (
        f"score: iteration {iteration}: {failed} of {sum(statuses.values())} rewards failed ({counts});"
        f" first: {first['name']}: {first['error']}; the same command scores only those again,"
        " `score.on_error: drop` leaves their rollouts out"
    )
