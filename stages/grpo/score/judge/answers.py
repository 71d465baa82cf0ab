"""answers: what a judge answers about one shard of rollouts, kept as it comes.

Every batch is committed before the next one is waited for: a killed score asks only what was under way. In
the end they are one file of `judgements`. Another pattern, scale or weight reads them again; only what failed
is asked again.
"""

from collections.abc import Mapping
from contextlib import closing

from grpo.artifacts import Run, Staging
from grpo.score.judge.completion import Judgement
from grpo.score.judge.rubric import question, read_score
from grpo.score.outcome import Key, Outcome
from grpo.score.scorers import Rollout, Scorers
from grpo.score.shard import File, Shard, found_in, table_of

TABLE = "judgements"
_NOT_APPLICABLE = Outcome(None, "not_applicable")


def score_by_judge(
    run: Run,
    staging: Staging,
    opened: Scorers,
    shard: Shard,
    rollouts: list[Rollout],
    kept: Mapping[Key, Outcome],
) -> dict[Key, Outcome]:
    """The outcomes of a shard, once its judgements are committed.

    kept: the outcomes of the shard's earlier output that did not fail; the others are asked about again.
    Raises Interrupted, with what was answered committed, when a signal asked to stop.
    """
    assert shard.reward.judge is not None
    rubric = opened.rubrics[shard.reward.name]
    asked = {each.key: question(rubric, each.prompt, each.response, each.columns) for each in rollouts}
    questions = {key: text for key, text in asked.items() if text is not None}
    earlier = {}
    if shard.old_answers is not None:
        for key, said in found_in(run, shard.old_answers, Judgement).items():
            if said.status == "ok" and key in questions and (shard.old is None or key in kept):
                earlier[key] = said
    outcomes = dict.fromkeys(asked, _NOT_APPLICABLE)
    for key, said in _commit_answers(run, staging, opened, shard, questions, earlier).items():
        read = None if said.answer is None else read_score(shard.reward.judge, said.answer)
        outcomes[key] = read or Outcome(None, said.status, said.error)
    return outcomes


def _commit_answers(
    run: Run,
    staging: Staging,
    opened: Scorers,
    shard: Shard,
    questions: dict[Key, str],
    earlier: dict[Key, Judgement],
) -> dict[Key, Judgement]:
    """The judgements of a shard, committed: one of each question."""
    reward, table = shard.reward, shard.work.answers_table

    def committed(name: str) -> dict[Key, Judgement] | None:
        record = staging.committed(name)
        return None if record is None else found_in(run, File(record, staging.folder / name), Judgement)

    def batch_name() -> str:  # of a file that is there until the output is committed, and no longer
        return staging.file_name(f"answers-{shard.index:05d}", batches)

    if (whole := committed(shard.answers_name)) is not None:
        return whole
    answers, batches = dict(earlier), 0
    while (batch := committed(batch_name())) is not None:
        answers |= batch
        batches += 1
    todo = {key: text for key, text in questions.items() if key not in answers}
    title = f"{staging.plan.stage} {shard.work.iteration} {reward.name}"
    # Closed at once, whatever goes wrong here: requests must not outlive the judge's event loop.
    with (
        closing(opened.judges[reward.name].ask(todo, run.console.is_stopping)) as arriving,
        run.console.progress(title, len(todo), "questions") as advance,
    ):
        for batch in arriving:
            staging.write_table(table, batch_name(), table_of(shard, table, batch))
            answers |= batch
            batches += 1
            advance(len(batch))
    run.console.stop_requested()
    ordered = {key: answers[key] for key in questions}
    labels = {"reward": reward.name, "rubric": opened.rubrics[reward.name]}
    staging.write_table(table, shard.answers_name, table_of(shard, table, ordered), shard.asked, **labels)
    return ordered
