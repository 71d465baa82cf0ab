"""score: rollouts + prompts -> rewards.

One row per rollout and reward. A shard is one reward over one rollout shard: an unchanged reward is kept by
a hard link, a new weight rewrites its rows without scoring, and a reward added later scores only itself.
A rollout that cannot be scored is a row with a status, never a silent zero. What a judge answered stands in
`judgements`, beside.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa

from grpo import tables
from grpo.artifacts import ActiveRun, FileRecord, Manifest, Product, Run, Staging, id_of, lacking
from grpo.config import RewardConfig
from grpo.errors import EngineError
from grpo.score import scorers
from grpo.score.judge import answers as judgements
from grpo.score.outcome import Outcome
from grpo.score.plan import NAME, OUTPUT
from grpo.score.scorers import Key, Rollout, Scorers
from grpo.score.shard import File, Shard, Work, rows_of, shard_of
from grpo.score.signal import say_short, signal_summary

_FAILED = ("error", "timeout", "nonfinite")
_READ = ["group_id", "sample_id", "prompt_id", "response", "response_token_ids"]


def check(run: Run, until: int, resources: Callable[[str], Any]) -> None:
    """Open what scores: a function, model or judge that is no use is an error of that."""
    resources(NAME)


def open_resource(run: ActiveRun) -> AbstractContextManager[Scorers]:
    """What scores, kept open between iterations; errors as scorers.open_scorers()."""
    return scorers.open_scorers(run)


def release(opened: Scorers) -> None:
    """Take the reward models off the accelerator until they are asked again."""
    for model in opened.models.values():
        model.release()


def after(run: ActiveRun, manifest: Manifest, opened: Scorers) -> None:
    """Raise EngineError (exit 8) for committed rows that failed, unless `score.on_error` is drop."""
    assert manifest.iteration is not None
    if lacking(run, manifest):
        raise EngineError(complaint(run, f"score: iteration {manifest.iteration}", OUTPUT, manifest))
    say_short(run, run.require("rollouts", manifest.iteration, "grpo generate"), manifest)


def produce(run: ActiveRun, iteration: int, staging: Staging, opened: Scorers) -> Product:
    """The `rewards` of one iteration: what of them is not there yet is scored."""
    rollouts = run.require("rollouts", iteration, "grpo generate")
    files = [File(file, run.path_of(file, "rollouts", iteration)) for file in rollouts.files]
    before = run.manifest(OUTPUT, iteration)
    work = Work(OUTPUT, judgements.TABLE, "part", iteration, files, staging.plan.inputs["prompts"], before)
    ids, held = score(run, staging, opened, work)
    summary = summary_of(run, held)
    summary |= signal_summary(run, staging, rollouts, held, summary["weights"].values())
    return Product(ids, held, summary)


def score(
    run: ActiveRun, staging: Staging, opened: Scorers, work: Work
) -> tuple[dict[str, str], list[FileRecord]]:
    """Score what of `work` is not scored yet: the id of each reward, and all shards, judgements last."""
    earlier = None if _asked_again(run, staging, work.before) else work.before
    scored: list[FileRecord] = []
    answered: list[FileRecord] = []
    ids = {}
    for reward in run.config.score.rewards:
        own = []
        for rollouts in work.rollouts:
            shard = shard_of(staging, work, reward, rollouts, earlier, len(scored))
            record = staging.committed(shard.name(staging))
            if record is None:
                with staging.clock(reward.name):
                    record = _score_shard(run, staging, opened, shard)
                run.console.stop_requested()
            answers = staging.committed(shard.answers_name(staging))
            answered += [answers] if answers is not None else []
            own.append(record)
            scored.append(record)
        ids[f"reward/{reward.name}"] = id_of(own)
    return ids, [*scored, *answered]


def summary_of(run: ActiveRun, held: list[FileRecord]) -> dict[str, Any]:
    """How many rewards failed, what became of each, and their weights."""
    statuses: Counter[str] = Counter()
    for record in held:
        statuses.update(record.labels.get("statuses", {}))
    weights = {reward.name: reward.weight for reward in run.config.score.rewards}
    return {"failed": _failed(statuses), "statuses": dict(statuses), "weights": weights}


def _asked_again(run: ActiveRun, staging: Staging, before: Manifest | None) -> bool:
    """Whether this is a `--force` with nothing changed: then every reward is computed anew."""
    again = before is not None and staging.attempt > before.attempt and staging.plan.same_as(before)
    return again and not staging.only_failed and not lacking(run, before)


def _score_shard(run: ActiveRun, staging: Staging, opened: Scorers, shard: Shard) -> FileRecord:
    """Commit one reward over one rollout shard, keeping what an earlier output already holds of it."""
    reward, old = shard.reward, shard.old
    name = shard.name(staging)
    if old is not None and _is_unchanged(old.record, reward):
        if shard.old_answers is not None:
            staging.link_table(shard.old_answers.record, shard.old_answers.path, shard.answers_name(staging))
        return staging.link_table(old.record, old.path, name)
    rollouts = [Rollout(**row) for row in rows_of(run, shard.rollouts, _READ)]
    kept = {
        (row["group_id"], row["sample_id"]): Outcome(row["value"], row["status"], row["error"])
        for row in (rows_of(run, old) if old is not None else [])
        if row["status"] not in _FAILED
    }
    if reward.judge is not None:
        outcomes = judgements.score_by_judge(run, staging, opened, shard, rollouts, kept)
    else:
        todo = [rollout for rollout in rollouts if rollout.key not in kept]
        outcomes = kept | _score(run, staging, opened, shard, todo)
    ordered = [outcomes[rollout.key] for rollout in rollouts]
    data = _table(shard.work.iteration, reward, rollouts, ordered)
    statuses = dict(Counter(outcome.status for outcome in ordered))
    labels = {"reward": reward.name, "weight": reward.weight, "statuses": statuses}
    return staging.write_shard(shard.work.table, name, data, shard.unit, **labels)


def _score(
    run: ActiveRun, staging: Staging, opened: Scorers, shard: Shard, rollouts: list[Rollout]
) -> dict[Key, Outcome]:
    outcomes = {}
    title = f"{staging.plan.stage} {shard.work.iteration} {shard.reward.name}"
    with run.console.progress(title, len(rollouts), "rollouts") as advance:
        for rollout, outcome in scorers.score(run, opened, shard.work.iteration, shard.reward, rollouts):
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
