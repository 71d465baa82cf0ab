"""answers: what a judge answers about one shard of rollouts, kept as it comes.

Every batch is committed before the next one is waited for: a killed score asks only what was under way. At
the end they are one file. Another pattern, scale or weight reads it again; only what failed is asked again.
"""

from contextlib import closing
from itertools import count

from grpo.artifacts import ActiveRun, FileRecord, Staging
from grpo.score.judge.completion import Judgement
from grpo.score.judge.rubric import question, read_score
from grpo.score.outcome import Key, Outcome
from grpo.score.scorers import Rollout, Scorers
from grpo.score.shard import File, Shard, found_in, table_of

TABLE = "judgements"


def score_by_judge(
    run: ActiveRun, opened: Scorers, shard: Shard, rollouts: list[Rollout], kept: set[Key]
) -> dict[Key, Outcome]:
    """The outcomes of a shard, once its judgements are committed.

    kept: what did not fail in the shard's earlier output; the others are asked about again. Raises
    Interrupted, with what was answered committed, when a signal asked to stop.
    """
    assert shard.reward.judge is not None
    staging, table = shard.task.staging, shard.task.answers_table
    rubric = opened.judges[shard.reward.name].rubric
    asked = {each.key: question(rubric, each.prompt, each.response, each.columns) for each in rollouts}
    record = staging.committed(shard.answers_name)
    if record is None:
        questions = {key: text for key, text in asked.items() if text is not None}
        answers = _answers(run, opened, shard, questions, kept)
        data = table_of(shard, table, {key: answers[key] for key in questions})
        labels = {"reward": shard.reward.name, "rubric": rubric}
        record = staging.write_shard(table, shard.answers_name, data, shard.asked, **labels)
    outcomes = dict.fromkeys(asked, Outcome(None, "not_applicable"))
    for key, said in _staged(staging, record).items():
        run.console.stop_requested()  # a pattern may take its second with every answer
        read = None if said.answer is None else read_score(shard.reward.judge, said.answer)
        outcomes[key] = read or Outcome(None, said.status, said.error)
    return outcomes


def _answers(
    run: ActiveRun, opened: Scorers, shard: Shard, questions: dict[Key, str], kept: set[Key]
) -> dict[Key, Judgement]:
    """Of an earlier output, of a try that was cut off, and else asked for now, a batch at a time."""
    staging, table = shard.task.staging, shard.task.answers_table
    earlier = found_in(run, shard.old_answers, Judgement) if shard.old_answers is not None else {}
    # A time-out that counts as a number is an answer too.
    good = ("ok",) if shard.reward.on_timeout == "error" else ("ok", "timeout")
    fine = {key for key, said in earlier.items() if said.status in good}
    answers = {key: earlier[key] for key in (fine if shard.old is None else fine & kept)}
    # Files that are there until the output is committed, and no longer.
    names = (staging.file_name(f"answers-{shard.index:05d}", number) for number in count())
    for name in names:
        record = staging.committed(name)
        if record is None:
            break
        answers |= _staged(staging, record)
    todo = {key: text for key, text in questions.items() if key not in answers}
    # Closed at once, whatever goes wrong here: requests must not outlive the judge's event loop.
    with (
        closing(opened.judges[shard.reward.name].ask(todo, run.console.is_stopping)) as arriving,
        run.console.progress(shard.title, len(todo), "questions") as advance,
    ):
        for batch in arriving:
            staging.write_shard(table, name, table_of(shard, table, batch))
            name = next(names)
            answers |= batch
            advance(len(batch))
    run.console.stop_requested()
    return answers


def _staged(staging: Staging, record: FileRecord) -> dict[Key, Judgement]:
    return found_in(staging.run, File(record, staging.folder / record.name), Judgement)
