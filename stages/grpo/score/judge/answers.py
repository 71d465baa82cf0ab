"""answers: what a judge answers about one shard of rollouts, kept as it comes.

Every batch of answers is committed before the next one is waited for, so that a killed score asks only what
was under way. When all are there they become one file of `judgements`. An answer that is there is not asked
for again: another pattern, scale or weight reads it again. Only what failed is.
"""

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from grpo import tables
from grpo.artifacts import ActiveRun, Staging
from grpo.score import scorers
from grpo.score.judge.completion import Judgement
from grpo.score.outcome import Outcome
from grpo.score.scorers import NOT_APPLICABLE, Key, Rollout, Scorers
from grpo.score.shard import Shard, rows_of

TABLE = "judgements"


def score_by_judge(
    run: ActiveRun,
    staging: Staging,
    tool: Scorers,
    shard: Shard,
    rollouts: list[Rollout],
    kept: Mapping[Key, Outcome],
) -> dict[Key, Outcome]:
    """The outcomes of a shard, once its judgements are committed.

    kept: the outcomes of the shard's earlier output that did not fail; the others are asked about again.
    Raises Interrupted, with what was answered committed, when a signal asked to stop.
    """
    earlier = {}
    if shard.old_answers is not None:
        for key, said in _judgements(rows_of(run, shard.old_answers)).items():
            if said.status == "ok" and (shard.old is None or key in kept):
                earlier[key] = said
    said_of = _commit_answers(run, staging, tool, shard, rollouts, earlier)
    outcomes = {key: scorers.outcome_of(shard.reward, said) for key, said in said_of.items()}
    return {rollout.key: outcomes.get(rollout.key, NOT_APPLICABLE) for rollout in rollouts}


def _commit_answers(
    run: ActiveRun,
    staging: Staging,
    tool: Scorers,
    shard: Shard,
    rollouts: list[Rollout],
    earlier: dict[Key, Judgement],
) -> dict[Key, Judgement]:
    """The judgements of a shard, committed. A rollout to which the rubric does not apply has none."""
    name = shard.answers_name(staging)
    if staging.committed(name) is not None:
        return _staged(staging, shard, name)
    reward = shard.reward
    asked = {key: text for key, text in scorers.questions(tool, reward, rollouts).items() if text is not None}
    answers = {key: said for key, said in earlier.items() if key in asked}
    batches = 0
    while staging.committed(batch := _batch_name(staging, shard, batches)) is not None:
        answers |= _staged(staging, shard, batch)
        batches += 1
    todo = {key: text for key, text in asked.items() if key not in answers}
    title = f"{staging.plan.stage} {shard.work.iteration} {reward.name}"
    # Closed at once, whatever goes wrong here: requests must not outlive the judge's event loop.
    with (
        closing(scorers.ask(run, tool, reward, todo)) as arriving,
        run.console.progress(title, len(todo), "questions") as advance,
    ):
        for found in arriving:
            data = _table(shard, found.items())
            staging.write_shard(shard.work.answers_table, _batch_name(staging, shard, batches), data)
            answers |= found
            batches += 1
            advance(len(found))
    run.console.stop_requested()
    ordered = {rollout.key: answers[rollout.key] for rollout in rollouts if rollout.key in asked}
    labels = {"reward": reward.name, "rubric": tool.rubrics[reward.name]}
    staging.write_shard(shard.work.answers_table, name, _table(shard, ordered.items()), shard.asked, **labels)
    return ordered


def _batch_name(staging: Staging, shard: Shard, number: int) -> str:
    """A file that is there until the output is committed, and no longer."""
    return staging.file_name(f"answers-{shard.index:05d}", number)


def _staged(staging: Staging, shard: Shard, name: str) -> dict[Key, Judgement]:
    """Of a file that this output has verified, or written."""
    path = staging.folder / name
    return _judgements(tables.decode(shard.work.answers_table, [(path, path.read_bytes())]).to_pylist())


def _judgements(rows: Iterable[dict[str, Any]]) -> dict[Key, Judgement]:
    ours = Judgement.__dataclass_fields__
    return {
        (row["group_id"], row["sample_id"]): Judgement(**{name: row[name] for name in ours}) for row in rows
    }


def _table(shard: Shard, judgements: Iterable[tuple[Key, Judgement]]) -> pa.Table:
    of_all = {"iteration": shard.work.iteration, "name": shard.reward.name}
    rows = [{**of_all, "group_id": key[0], "sample_id": key[1], **asdict(said)} for key, said in judgements]
    return pa.Table.from_pylist(rows, schema=tables.schema(shard.work.answers_table))
