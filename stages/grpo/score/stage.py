"""score: rollouts + prompts -> rewards.

One row per rollout and reward. A shard is one reward over one rollout shard: an unchanged reward is kept by
a hard link, a new weight rewrites its rows without scoring, and a reward added later scores only itself.
A rollout that cannot be scored is a row with a status, never a silent zero. What a judge answered stands in
`judgements`, beside.
"""

from collections import Counter
from collections.abc import Collection
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from grpo import tables
from grpo.artifacts import FileRecord, Manifest, Plan, Run, Staging, digest, id_of
from grpo.config import RewardConfig
from grpo.config.judge import READING, TRANSPORT
from grpo.errors import EngineError
from grpo.score import judgements, scorers
from grpo.score.functions import source_sha256
from grpo.score.outcome import Outcome
from grpo.score.scorers import Key, Rollout, Scorers, columns_of, spec_of
from grpo.score.shard import Shard, Work, rows_of

__all__ = ["Scorers", "Work", "columns_of", "spec_of"]  # of the rooms beside, for whoever scores rollouts

NAME = "score"
OUTPUT = "rewards"
STAGE_VERSION = 1
_FAILED = ("error", "timeout", "nonfinite")
_READ = ["group_id", "sample_id", "prompt_id", "response", "response_token_ids"]


def plan(run: Run, iteration: int) -> Plan:
    """What this stage would do now. Raises InputError (exit 4) when the rollouts are missing."""
    run.require("rollouts", iteration, f"grpo generate --iteration {iteration}")
    references = (f"rollouts@{iteration}", "prompts")
    return Plan(
        stage=NAME,
        stage_version=STAGE_VERSION,
        output=OUTPUT,
        iteration=iteration,
        config={"score": {"rewards": described(run)}},
        reads={reference: run.id_of(reference) or "" for reference in references},
        sources=sources_of(run),
    )


def described(run: Run) -> dict[str, Any]:
    """Every reward as configured, by name."""
    return {reward.name: _described(reward, {"name"}) for reward in run.config.score.rewards}


def _described(
    reward: RewardConfig, without: set[str], without_of_judge: Collection[str] = ()
) -> dict[str, Any]:
    """The configuration of a reward as part of a fingerprint: a judge's is there for judges alone."""
    found = reward.model_dump(exclude=without)
    if reward.judge is None:
        del found["judge"]
    else:
        found["judge"] = reward.judge.model_dump(exclude={*TRANSPORT, *without_of_judge})
    return found


def sources_of(run: Run) -> dict[str, str]:
    """What computes each reward, as part of a plan. Raises what finding its file, model or rubric does."""
    return {f"score.rewards.{reward.name}": _source(run, reward) for reward in run.config.score.rewards}


def _source(run: Run, reward: RewardConfig) -> str:
    """sha256 of the function's file (empty: built in) or of the rubric's text; the id of a reward model."""
    if reward.function is not None:
        return source_sha256(reward.function, run.imports)
    if reward.judge is not None:
        return sha256(scorers.rubric_of(run, reward).encode()).hexdigest()
    return run.checkpoint_id(str(reward.model))


def open_tool(run: Run) -> AbstractContextManager[Scorers]:
    """What scores, kept open between iterations; errors as scorers.open_scorers()."""
    return scorers.open_scorers(run)


def release(tool: Scorers) -> None:
    """Take the reward models off the accelerator until they are asked again."""
    for model in tool.models.values():
        model.release()


def run(run: Run, iteration: int, staging: Staging, tool: Scorers) -> Manifest:
    """Score what is not scored yet and commit `rewards` of one iteration.

    Raises EngineError (exit 8) after the commit when rewards failed and `score.on_error` is stop.
    """
    rollouts = run.require("rollouts", iteration, "grpo generate")
    files = [(file, run.path_of(file, "rollouts", iteration)) for file in rollouts.files]
    before = run.manifest(OUTPUT, iteration)
    work = Work(OUTPUT, "part", iteration, files, staging.plan.reads["prompts"], before)
    ids, held = score(run, staging, tool, work)
    manifest = staging.commit(ids, held, summary_of(run, held))
    if run.partial(manifest):
        raise EngineError(complaint(run, f"score: iteration {iteration}", OUTPUT, manifest))
    return manifest


def score(run: Run, staging: Staging, tool: Scorers, work: Work) -> tuple[dict[str, str], list[FileRecord]]:
    """Score what of `work` is not scored yet: the id of each reward, and all shards, judgements last."""
    earlier = None if _asked_again(run, staging, work.before) else work.before
    scored: list[FileRecord] = []
    answered: list[FileRecord] = []
    ids = {}
    for reward in run.config.score.rewards:
        own = []
        for rollouts, path in work.rollouts:
            shard = _shard(staging, work, reward, rollouts, path, earlier, len(scored))
            record = staging.committed(staging.file_name(work.prefix, shard.index))
            if record is None:
                with staging.clock(reward.name):
                    record = _score_shard(run, staging, tool, shard)
                run.console.stop_requested()
            answers = staging.committed(staging.file_name(judgements.TABLE, shard.index))
            answered += [answers] if answers is not None else []
            own.append(record)
            scored.append(record)
        ids[f"reward/{reward.name}"] = id_of(own)
    return ids, [*scored, *answered]


def summary_of(run: Run, held: list[FileRecord]) -> dict[str, Any]:
    """How many rewards failed, what became of each, and their weights."""
    statuses: Counter[str] = Counter()
    for record in held:
        statuses.update(record.labels.get("statuses", {}))  # judgements have none
    weights = {reward.name: reward.weight for reward in run.config.score.rewards}
    return {"failed": _failed(statuses), "statuses": dict(statuses), "weights": weights}


def _asked_again(run: Run, staging: Staging, before: Manifest | None) -> bool:
    """Whether this is a `--force` with nothing changed: then every reward is computed anew."""
    again = before is not None and staging.attempt > before.attempt and staging.plan.same_as(before)
    return again and not staging.only_failed and not run.partial(before)


def _shard(
    staging: Staging,
    work: Work,
    reward: RewardConfig,
    rollouts: FileRecord,
    path: Path,
    earlier: Manifest | None,
    index: int,
) -> Shard:
    """earlier: the output whose rows may be kept."""
    apart = {"name", "weight", "timeout_s"}  # what no value depends on
    read = [staging.plan.sources[f"score.rewards.{reward.name}"], rollouts.sha256, work.prompts_id]
    where = {"rubric"} if reward.judge is not None else set()  # its text is the source
    unit = digest([STAGE_VERSION, _described(reward, apart, where), *read])
    asked = digest([STAGE_VERSION, _described(reward, apart, {*where, *READING}), *read])
    files = earlier.files if earlier else []
    old = next((file for file in files if file.table == work.table and file.unit == unit), None)
    same = [file for file in files if file.table == judgements.TABLE and file.unit == asked]
    same.sort(key=lambda file: file.labels["reward"] != reward.name)  # its own first
    return Shard(work, index, reward, rollouts, path, unit, asked, old, same[0] if same else None)


def _score_shard(run: Run, staging: Staging, tool: Scorers, shard: Shard) -> FileRecord:
    """Commit one reward over one rollout shard, keeping what an earlier output already holds of it."""
    reward, old, work = shard.reward, shard.old, shard.work
    name = staging.file_name(work.prefix, shard.index)
    kept: dict[Key, Outcome] = {}
    if old is not None:
        path = run.path_of(old, staging.plan.output, work.iteration)
        if _is_unchanged(old, reward):
            judgements.keep(run, staging, shard)
            return staging.link_table(old, path, name)
        for row in rows_of(run, old, path):
            if row["status"] not in _FAILED:
                outcome = Outcome(row["value"], row["status"], row["error"])
                kept[row["group_id"], row["sample_id"]] = outcome
    rollouts = [Rollout(**row) for row in rows_of(run, shard.rollouts, shard.path, _READ)]
    if reward.judge is not None:
        outcomes = judgements.score_by_judge(run, staging, tool, shard, rollouts, kept)
    else:
        outcomes = kept | _score(
            run, staging, tool, shard, [each for each in rollouts if each.key not in kept]
        )
    ordered = [outcomes[rollout.key] for rollout in rollouts]
    data = _table(work.iteration, reward, rollouts, ordered)
    statuses = dict(Counter(outcome.status for outcome in ordered))
    labels = {"reward": reward.name, "weight": reward.weight, "statuses": statuses}
    return staging.write_table(work.table, name, data, shard.unit, **labels)


def _score(
    run: Run, staging: Staging, tool: Scorers, shard: Shard, rollouts: list[Rollout]
) -> dict[Key, Outcome]:
    outcomes = {}
    title = f"{staging.plan.stage} {shard.work.iteration} {shard.reward.name}"
    with run.console.progress(title, len(rollouts), "rollouts") as advance:
        for rollout, outcome in scorers.score(run, tool, shard.work.iteration, shard.reward, rollouts):
            outcomes[rollout.key] = outcome
            advance(1)
    return outcomes


def _is_unchanged(old: FileRecord, reward: RewardConfig) -> bool:
    """Whether a shard can be kept as it is: complete, and under the same name and weight."""
    same = (old.labels["reward"], old.labels["weight"]) == (reward.name, reward.weight)
    return same and not _failed(old.labels["statuses"])


def _failed(statuses: dict[str, int]) -> int:
    return sum(statuses.get(status, 0) for status in _FAILED)


def _table(
    iteration: int, reward: RewardConfig, rollouts: list[Rollout], outcomes: list[Outcome]
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


def complaint(run: Run, where: str, table: str, manifest: Manifest) -> str:
    """That rewards failed, how many and the first of them; where: of what, as an error begins."""
    assert manifest.iteration is not None
    statuses: dict[str, int] = manifest.summary["statuses"]
    counts = ", ".join(f"{statuses[status]} {status}" for status in _FAILED if statuses.get(status))
    rows = run.read(table, manifest.iteration, ["name", "status", "error"]).to_pylist()
    first = next((row for row in rows if row["error"]), {"name": "", "error": ""})
    return (
        f"{where}: {manifest.summary['failed']} of {sum(statuses.values())} rewards failed ({counts});"
        f" first: {first['name']}: {first['error']}; the same command scores only those again,"
        " `score.on_error: drop` leaves their rollouts out"
    )
