"""score: rollouts + prompts -> rewards, one row per rollout and reward.

A shard is one reward over one rollout shard: an unchanged reward is kept by a hard link, a new weight
rewrites its rows without scoring, and a reward added later scores only itself. A rollout that cannot be
scored is a row with a status, never a silent zero. What a judge answered stands in `judgements`, beside.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from grpo import sql
from grpo.artifacts import ActiveRun, FileRecord, Manifest, Product, Staging, id_of, lacking, num_rounds
from grpo.errors import EngineError
from grpo.score import scorers
from grpo.score.judge import answers as judgements
from grpo.score.outcome import Outcome
from grpo.score.plan import NAME, OUTPUT
from grpo.score.scorers import Scorers
from grpo.score.shard import File, Shard, Work, found_in, read, staged, table_of
from grpo.sql.scored import count_signal, create_scored

_FAILED = ("error", "timeout", "nonfinite")


def check(run: ActiveRun, until: int, resources: Callable[[str], Any]) -> None:
    """Open what scores: a function, model or judge that is no use is an error of that."""
    resources(NAME)


open_resource = scorers.open_scorers


def release(opened: Scorers) -> None:
    """Take the reward models off the accelerator until they are asked again."""
    for model in opened.models.values():
        model.release()


def after(run: ActiveRun, manifest: Manifest, opened: Scorers) -> None:
    """Raise as raise_for_failed(); say where the last round has not brought enough groups with signal."""
    raise_for_failed(run, f"score: iteration {manifest.iteration}", OUTPUT, manifest)
    rollouts = run.require("rollouts", manifest.iteration, "grpo generate")
    wanted, rounds = _dynamic_sampling(rollouts), num_rounds(rollouts)
    if wanted is None or rounds < wanted["max_rounds"]:
        return
    found = manifest.summary["groups_with_signal"]
    if found < wanted["min_groups"]:
        run.console.say(
            f"score {manifest.iteration}: {found} of {wanted['min_groups']} groups with signal after {rounds}"
            " rounds (generate.dynamic_sampling.max_rounds); continuing with these"
        )


def raise_for_failed(run: ActiveRun, where: str, table: str, manifest: Manifest) -> None:
    """Raise EngineError (exit 8) for committed rows that failed, unless `score.on_error` is drop.

    where: of what they are, as the message begins; it says how many failed, and the first of them.
    """
    if not lacking(run, manifest):
        return
    statuses: dict[str, int] = manifest.summary["statuses"]
    counts = ", ".join(f"{statuses[status]} {status}" for status in _FAILED if statuses.get(status))
    rows = run.read(table, manifest.iteration, ["name", "error"]).to_pylist()
    first = next(row for row in rows if row["error"])
    raise EngineError(
        f"{where}: {manifest.summary['failed']} of {sum(statuses.values())} rewards failed ({counts});"
        f" first: {first['name']}: {first['error']}; the same command scores only those again,"
        " `score.on_error: drop` leaves their rollouts out"
    )


def produce(run: ActiveRun, iteration: int, staging: Staging, opened: Scorers) -> Product:
    """The `rewards` of one iteration: what of them is not there yet is scored."""
    rollouts = run.require("rollouts", iteration, "grpo generate")
    files = [File(file, run.path_of(file, "rollouts", iteration)) for file in rollouts.files]
    work = Work(OUTPUT, judgements.TABLE, "part", iteration, files, staging.plan.inputs["prompts"])
    ids, held = score(run, staging, opened, work)
    summary = summary_of(run, held)
    if _dynamic_sampling(rollouts) is not None:  # else nobody asks
        rewards = read(run, OUTPUT, staged(staging, held, OUTPUT))
        with staging.clock("signal"), sql.connect([run], iteration, ("rollouts",)) as connection:
            sql.register(connection, "_rewards_0", rewards)
            create_scored(connection, summary["weights"].values())
            summary["groups_with_signal"] = count_signal(connection)
        summary["rounds"] = num_rounds(rollouts)
    return Product(ids, held, summary)


def score(
    run: ActiveRun, staging: Staging, opened: Scorers, work: Work
) -> tuple[dict[str, str], list[FileRecord]]:
    """Score what of `work` is not scored yet: the id of each reward, and all shards, judgements last."""
    before = run.manifest(staging.plan.output, work.iteration)
    earlier = None if _asked_again(run, staging, before) else before
    scored: list[FileRecord] = []
    answered: list[FileRecord] = []
    ids = {}
    for reward in run.config.score.rewards:
        own = []
        for rollouts in work.rollouts:
            shard = Shard(staging, work, reward, rollouts, earlier, len(scored) + len(own))
            record = staging.committed(shard.name)
            if record is None:
                with staging.clock(reward.name):
                    record = _score_shard(run, staging, opened, shard)
                run.console.stop_requested()
            own.append(record)
            if (answers := staging.committed(shard.answers_name)) is not None:
                answered.append(answers)
        ids[f"reward/{reward.name}"] = id_of(own)
        scored += own
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
    reward, old, work = shard.reward, shard.old, shard.work
    held = old.record.labels if old is not None else {}
    same = (held.get("reward"), held.get("weight")) == (reward.name, reward.weight)
    if old is not None and same and not _failed(held["statuses"]):
        if shard.old_answers is not None:
            staging.link_table(*shard.old_answers, shard.answers_name)
        return staging.link_table(*old, shard.name)
    rollouts = scorers.rollouts_of(run, shard.rollouts, opened.prompts)
    before = found_in(run, old, Outcome) if old is not None else {}
    kept = {key: outcome for key, outcome in before.items() if outcome.status not in _FAILED}
    if reward.judge is not None:
        outcomes = judgements.score_by_judge(run, staging, opened, shard, rollouts, set(kept))
    else:
        outcomes = dict(kept)
        todo = [rollout for rollout in rollouts if rollout.key not in kept]
        title = f"{staging.plan.stage} {work.iteration} {reward.name}"
        with run.console.progress(title, len(todo), "rollouts") as advance:
            for rollout, outcome in scorers.score(run, opened, work.iteration, reward, todo):
                outcomes[rollout.key] = outcome
                advance(1)
    ordered = {rollout.key: outcomes[rollout.key] for rollout in rollouts}
    statuses = dict(Counter(outcome.status for outcome in ordered.values()))
    labels = {"reward": reward.name, "weight": reward.weight, "statuses": statuses}
    data = table_of(shard, work.table, ordered)
    return staging.write_table(work.table, shard.name, data, shard.unit, **labels)


def _failed(statuses: dict[str, int]) -> int:
    return sum(statuses.get(status, 0) for status in _FAILED)


def _dynamic_sampling(rollouts: Manifest) -> dict[str, int] | None:
    """generate.dynamic_sampling as the rollouts were planned with it."""
    found: dict[str, int] | None = rollouts.config.get("generate", {}).get("dynamic_sampling")
    return found
