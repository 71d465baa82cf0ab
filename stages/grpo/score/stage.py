"""score: rollouts + prompts -> rewards, one row per rollout and reward.

A shard is one reward over one rollout shard: an unchanged reward is kept by a hard link, a new weight
rewrites its rows without scoring, and a reward added later scores only itself. A rollout that cannot be
scored is a row with a status, never a silent zero. What a judge answered stands in `judgements`, beside.
"""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

from grpo import sql
from grpo.artifacts import (
    ActiveRun,
    FileRecord,
    Manifest,
    Product,
    Staging,
    are_own,
    id_of,
    lacking,
    num_rounds,
    read_rollouts,
)
from grpo.errors import EngineError
from grpo.score import scorers, shard_rows
from grpo.score.judge import answers as judgements
from grpo.score.outcome import Key, Outcome
from grpo.score.plan import NAME, OUTPUT, keep_sources
from grpo.score.scorers import Scorers
from grpo.score.shard import REPEATED, File, ScoringTask, Shard, read, staged


def check(run: ActiveRun, until: int, resources: Callable[[str], Any]) -> None:
    """Open what scores: a function, model or judge that is no use is an error of that."""
    resources(NAME)


open_resource = scorers.open_scorers


def release(opened: Scorers) -> None:
    """Take the reward models and teachers off the accelerator until they are asked again."""
    for model in opened.models.values():
        model.release()
    for teacher in opened.teachers.values():
        teacher.release()


def after(run: ActiveRun, manifest: Manifest, opened: Scorers) -> None:
    """Raise as raise_for_failed(); say where the last round has not brought enough groups with signal."""
    raise_for_failed(run, f"score: iteration {manifest.iteration}", OUTPUT, manifest)
    rollouts = run.require("rollouts", manifest.iteration, "grpo generate")
    if "groups_with_signal" not in manifest.summary:
        return
    wanted, rounds = rollouts.config["generate"]["dynamic_sampling"], num_rounds(rollouts)
    found = manifest.summary["groups_with_signal"]
    if found < wanted["min_groups"] and rounds >= wanted["max_rounds"]:
        run.console.say(
            f"score {manifest.iteration}: {found} of {wanted['min_groups']} groups with signal after {rounds}"
            " rounds (generate.dynamic_sampling.max_rounds); continuing with these"
        )


def raise_for_failed(run: ActiveRun, where: str, table: str, manifest: Manifest) -> None:
    """Raise EngineError (exit 8) for committed rows that failed, unless `score.on_error` is drop.

    where: of what they are, as the message begins; it says how many failed, and the first of them.
    """
    if not manifest.summary["failed"] or run.config.score.on_error == "drop":
        return
    failed, statuses = manifest.summary["failed"], manifest.summary["statuses"]
    counts = ", ".join(f"{statuses[status]} {status}" for status in shard_rows.FAILED if statuses.get(status))
    rows = run.read(table, manifest.iteration, ["name", "status", "error"]).to_pylist()
    first = next(row for row in rows if row["status"] in shard_rows.FAILED)
    repeated = sum(len(file.labels.get(REPEATED, {"rollouts": ()})["rollouts"]) for file in manifest.files)
    again = "`grpo score --only-failed`" if table == OUTPUT else "`grpo evaluate --force`"
    ways = ["the same command scores only those again"] if repeated < failed else []
    if repeated:
        ways.append(
            f"{repeated} failed twice in the same way and {'are' if repeated > 1 else 'is'} not tried again"
            f" but by {again}; `on_timeout: 0.0` of a reward counts a time-out"
        )
    raise EngineError(
        f"{where}: {failed} of {sum(statuses.values())} rewards failed ({counts});"
        f" first: {first['name']}: {first['error']}; {'; '.join(ways)},"
        " `score.on_error: drop` leaves their rollouts out"
    )


def produce(run: ActiveRun, iteration: int, staging: Staging, opened: Scorers) -> Product:
    """The `rewards` of one iteration: what of them is not there yet is scored."""
    rollouts = run.require("rollouts", iteration, "grpo generate")
    if not are_own(run, "rollouts", iteration):
        read_rollouts(run, iteration)  # of rows that are not what was sampled, no reward is of use
    files = [File(file, run.path_of(file, "rollouts", iteration)) for file in rollouts.files]
    prompts_id = staging.plan.inputs["prompts"]
    held = score(
        run, opened, ScoringTask(staging, OUTPUT, judgements.TABLE, "part", iteration, files, prompts_id)
    )
    summary = summary_of(run, held)
    if rollouts.config.get("generate", {}).get("dynamic_sampling") is not None:  # else nobody asks
        rewards = read(run, OUTPUT, staged(staging, held, OUTPUT))
        with staging.clock("signal"), sql.connect([run], iteration, ("rollouts",)) as connection:
            sql.register(connection, "_rewards_0", rewards)
            sql.create_scored(connection, summary["weights"].values())
            [found] = sql.rows(connection, "sql/views/signal")
        summary |= {**found, "rounds": num_rounds(rollouts)}
    scored = [record for record in held if record.table == OUTPUT]
    ids = {
        f"reward/{name}": id_of([record for record in scored if record.labels["reward"] == name])
        for name in summary["weights"]
    }
    for number, (name, teacher) in enumerate(opened.teachers.items()):
        first = number * len(files)
        names = {staging.file_name("teacher", first + index): file for index, file in enumerate(files)}
        shards = teacher.commit(run, staging, names, earlier_of(run, staging, iteration))
        ids[f"teacher/{name}"] = id_of(shards)
        held += shards
    return Product(ids, held, summary)


def score(run: ActiveRun, opened: Scorers, task: ScoringTask) -> list[FileRecord]:
    """Score what of `task` is not scored yet: all its shards, reward by reward, judgements last."""
    staging = task.staging
    keep_sources(run, staging.plan.user_files)
    scorers.renew_rubrics(run, opened)
    earlier = earlier_of(run, staging, task.iteration)
    scored: list[FileRecord] = []
    answered: list[FileRecord] = []
    pairs = product(run.config.score.rewards, task.rollouts)
    shards = [Shard(task, *pair, earlier, index) for index, pair in enumerate(pairs)]
    if opened.workers:
        from grpo.score.scorer_pool import score_elsewhere

        score_elsewhere(run, opened.workers, opened.prompts, shards)
    for shard in shards:
        record = staging.committed(shard.name)
        if record is None:
            with staging.clock(shard.reward.name):
                record = _score_shard(run, opened, shard)
            run.console.stop_requested()
        scored.append(record)
        if (answers := staging.committed(shard.answers_name)) is not None:
            answered.append(answers)
    return [*scored, *answered]


def earlier_of(run: ActiveRun, staging: Staging, iteration: int) -> Manifest | None:
    """The committed output whose shards are kept where they are still right."""
    before = run.manifest(staging.plan.output, iteration)
    again = before is not None and staging.attempt > before.attempt and staging.plan.same_as(before)
    # A `--force` with nothing changed computes every reward anew.
    return None if again and not staging.only_failed and not lacking(run, before) else before


def summary_of(run: ActiveRun, held: list[FileRecord]) -> dict[str, Any]:
    """How many rewards failed, what became of each, and their weights."""
    statuses: Counter[str] = Counter()
    for record in held:
        statuses.update(record.labels.get("statuses", {}))
    weights = {reward.name: reward.weight for reward in run.config.score.rewards}
    return {"failed": shard_rows.num_failed(statuses), "statuses": dict(statuses), "weights": weights}


def _score_shard(run: ActiveRun, opened: Scorers, shard: Shard) -> FileRecord:
    """Commit one reward over one rollout shard, keeping what an earlier output already holds of it."""
    if (record := shard_rows.keep(shard)) is not None:
        return record
    begun = shard_rows.begin(run, opened.prompts, shard)
    return shard_rows.commit(run, begun, _outcomes(run, opened, begun))


def _outcomes(run: ActiveRun, opened: Scorers, begun: shard_rows.Begun) -> dict[Key, Outcome]:
    shard, rollouts, kept = begun.shard, begun.rollouts, begun.kept
    if shard.reward.judge is not None:
        return judgements.score_by_judge(run, opened, shard, rollouts, set(kept))
    outcomes = dict(kept)
    todo = begun.todo
    with run.console.progress(shard.title, len(todo), "rollouts") as advance:
        for rollout, outcome in scorers.score(run, opened, shard.task.iteration, shard.reward, todo):
            outcomes[rollout.key] = outcome
            advance(1)
    return outcomes
