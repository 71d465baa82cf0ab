"""settings: what else a configuration asks for: the run that is there, SQL, room for answers, a tracker."""

from grpo.artifacts import ActiveRun, lacks_run_json
from grpo.evaluate import plan as evaluation
from grpo.inspect.track import check_tracker
from grpo.manage.doctor.inputs import Checkpoint, Prompts
from grpo.manage.doctor.report import Report
from grpo.models.loading import load_tokenizer
from grpo.pipeline import runner
from grpo.pipeline.prepare import check_stand
from grpo.pipeline.signal import without_signal
from grpo.pipeline.stages import ADVANTAGE, GENERATE, Stage


def check_run(run: ActiveRun, report: Report) -> None:
    """Whether the run that is there, if one is, can be gone on with."""
    if not ((run.path / "run.json").exists() or lacks_run_json(run.path)):
        return
    found = f"{len(run.iterations())} of {run.config.iterations} iterations begun"
    with report.check("run", found, "what it stands on is still what is configured"):
        check_stand(run)
        runner.check_fresh(run, run.config.iterations)


def check_signal(run: ActiveRun, report: Report) -> None:
    """Whether the configuration alone says that nothing will be learned; nothing to say where it does not."""
    if lines := without_signal(run.config):
        with report.check("signal", "", "rewards that differ within a group") as check:
            check.warn("; ".join(lines))


def check_sql(run: ActiveRun, report: Report) -> None:
    """Whether SQL of the user's can be run."""
    config = run.config
    own: tuple[tuple[str, Stage, str | None], ...] = (
        ("prompts_sql", GENERATE, config.generate.prompts_sql),
        ("advantage.sql", ADVANTAGE, config.advantage.sql),
        ("advantage.where", ADVANTAGE, None if config.advantage.sql else config.advantage.where),
    )
    for name, stage, text in own:
        if text is not None:
            with report.check(name, text, "a query that can be run"):
                stage.load().check(run, config.iterations, None)


def check_track(run: ActiveRun, report: Report) -> None:
    """Whether the tracker is installed, and knows who logs to it."""
    if (name := run.config.track) is not None:
        with report.check("track", name, "the tracker's package, and its key where it needs one") as check:
            if note := check_tracker(name):
                check.warn(note)


def check_evaluation(run: ActiveRun, report: Report) -> None:
    """What is measured, every null resolved."""
    if run.config.evaluate is None:
        return
    wanted = evaluation.settings(run)
    passes = f"{wanted['pass_reward']} >= {wanted['pass_threshold']:g}"
    sampled = f"{wanted['samples_per_prompt']} responses at temperature {wanted['temperature']:g}"
    with report.check("evaluate", f"a response passes where {passes}; {sampled}", "") as check:
        if len(run.config.score.rewards) > 1 and run.config.evaluate.pass_reward is None:
            check.warn(
                f"evaluate.pass_reward: null is the first reward, {wanted['pass_reward']}; name the one that"
                " says what is right"
            )


def check_answers(run: ActiveRun, report: Report, policy: Checkpoint, prompts: Prompts) -> None:
    """Whether an answer has room in a response and no stop text in it; nothing to say where that is so."""
    answers = [row["answer"].strip() for row in prompts.rows if (row["answer"] or "").strip()]
    if not answers or policy.folder is None:
        return
    limit, tokenizer = run.config.generate.max_new_tokens, load_tokenizer(policy.folder)
    shortest = min(len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers)
    notes = []
    if shortest > limit:
        notes.append(f"generate.max_new_tokens: {limit} tokens hold no answer; the shortest has {shortest}")
    for text in run.config.generate.stop:
        if cut := sum(text in answer for answer in answers):
            notes.append(f"generate.stop: {text!r} is in {cut:,} of {len(answers):,} answers, and cuts them")
    if notes:
        with report.check("answers", f"the shortest has {shortest} tokens", "room for an answer") as check:
            check.warn("; ".join(notes))
