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
from grpo.score.signal import say_short, signal_summary

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

    @property
    def key(self) -> tuple[int, int]:
        """(group_id, sample_id): unique within the iteration."""
        return self.group_id, self.sample_id


@dataclass(frozen=True)
class _Shard:
    """One reward over one shard of rollouts. `old`: what an earlier output holds of the same `unit`."""

    iteration: int
    reward: RewardConfig
    rollouts: FileRecord
    unit: str
    old: FileRecord | None


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
                pool.check(spec_of(reward), columns)
        models = _open_models(run)
        yield Scorers(pool, prompts, columns, models)
    finally:
        pool.close()


def release(tool: Scorers) -> None:
    """Take the reward models off the accelerator until they are asked again."""
    for model in tool.models.values():
        model.release()


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
        for rollouts_file in rollouts.files:
            name = staging.file_name("part", len(held))
            record = staging.committed(name)
            if record is None:
                unit = _unit(staging, reward, rollouts_file)
                old = None if redo_all else _find(before, unit)
                shard = _Shard(iteration, reward, rollouts_file, unit, old)
                with staging.clock(reward.name):
                    record = _score_shard(run, staging, tool, shard, name)
                run.console.stop_requested()
            own.append(record)
            held.append(record)
        ids[f"reward/{reward.name}"] = id_of(own)
    statuses: Counter[str] = Counter()
    for record in held:
        statuses.update(record.labels["statuses"])
    failed = _failed(statuses)
    weights = {reward.name: reward.weight for reward in run.config.score.rewards}
    summary = {"failed": failed, "statuses": dict(statuses), "weights": weights}
    summary |= signal_summary(run, staging, rollouts, held, weights.values())
    manifest = staging.commit(ids, held, summary)
    if run.partial(manifest):
        raise EngineError(_complaint(run, iteration, failed, statuses))
    say_short(run, rollouts, manifest)
    return manifest


def _asked_again(staging: Staging, before: Manifest | None, partial: bool) -> bool:
    """Whether this is a `--force` with nothing changed: then every reward is computed anew."""
    again = before is not None and staging.attempt > before.attempt and staging.plan.same_as(before)
    return again and not partial


def _unit(staging: Staging, reward: RewardConfig, rollouts: FileRecord) -> str:
    """Digest of all that one reward over one rollout shard depends on. Not the weight or time-out."""
    described = reward.model_dump(exclude={"name", "weight", "timeout_s"})
    source = staging.plan.sources[f"score.rewards.{reward.name}"]
    return digest([STAGE_VERSION, described, source, rollouts.sha256, staging.plan.reads["prompts"]])


def _find(manifest: Manifest | None, unit: str) -> FileRecord | None:
    files = manifest.files if manifest else []
    return next((file for file in files if file.unit == unit), None)


def _score_shard(run: Run, staging: Staging, tool: Scorers, shard: _Shard, name: str) -> FileRecord:
    """Commit one reward over one rollout shard, keeping what an earlier output already holds of it."""
    reward, old = shard.reward, shard.old
    if old is not None and _is_unchanged(old, reward):
        return staging.link_table(old, run.path_of(old, OUTPUT, shard.iteration), name)
    rollouts = [_Rollout(**row) for row in _rows(run, "rollouts", shard.rollouts, shard.iteration, _READ)]
    outcomes = {
        (row["group_id"], row["sample_id"]): Outcome(row["value"], row["status"], row["error"])
        for row in (_rows(run, OUTPUT, old, shard.iteration) if old is not None else [])
        if row["status"] not in _FAILED
    }
    todo = [rollout for rollout in rollouts if rollout.key not in outcomes]
    title = f"score {shard.iteration} {reward.name}"
    with run.console.progress(title, len(todo), "rollouts") as advance:
        for rollout, outcome in _score(run, tool, reward, todo):
            outcomes[rollout.key] = outcome
            advance(1)
    ordered = [outcomes[rollout.key] for rollout in rollouts]
    data = _table(shard.iteration, reward, rollouts, ordered)
    statuses = dict(Counter(outcome.status for outcome in ordered))
    labels = {"reward": reward.name, "weight": reward.weight, "statuses": statuses}
    return staging.write_table(OUTPUT, name, data, shard.unit, **labels)


def _is_unchanged(old: FileRecord, reward: RewardConfig) -> bool:
    """Whether a shard can be kept as it is: complete, and under the same name and weight."""
    same = (old.labels["reward"], old.labels["weight"]) == (reward.name, reward.weight)
    return same and not _failed(old.labels["statuses"])


def _rows(
    run: Run, table: str, file: FileRecord, iteration: int, columns: list[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of one committed file, verified."""
    path = run.path_of(file, table, iteration)
    run.verify(file, path)
    rows: list[dict[str, Any]] = tables.decode(table, [(path, path.read_bytes())], columns).to_pylist()
    return rows


def _failed(statuses: dict[str, int]) -> int:
    return sum(statuses.get(status, 0) for status in _FAILED)


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
        outcomes = tool.pool.score(spec_of(reward), calls)
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


def spec_of(reward: RewardConfig) -> FunctionSpec:
    """A configured reward function as the workers are told of it."""
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
