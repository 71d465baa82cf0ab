"""doctor: is everything here that a configuration needs? Looks and tries, makes no run and takes no lock."""

from pathlib import Path
from tempfile import TemporaryDirectory

from grpo.artifacts import ActiveRun
from grpo.manage.doctor.copies import check_mirror
from grpo.manage.doctor.engine import AGREEMENT, check_agreement, check_engine
from grpo.manage.doctor.inputs import (
    check_held_out,
    check_lora,
    check_model,
    check_optimizer,
    check_prompts,
    check_surrogate,
)
from grpo.manage.doctor.machine import check_compiler, check_threads
from grpo.manage.doctor.memory import check_memory
from grpo.manage.doctor.overlap import check_overlap
from grpo.manage.doctor.places import check_execution
from grpo.manage.doctor.report import Report, print_report
from grpo.manage.doctor.rewards import check_rewards, check_teachers
from grpo.manage.doctor.settings import (
    check_answers,
    check_evaluation,
    check_run,
    check_signal,
    check_sql,
    check_track,
)
from grpo.manage.doctor.space import check_disk
from grpo.prompts.table import HELD_OUT

__all__ = ["Report", "examine", "print_report", "refuse"]


def examine(run: ActiveRun, with_model: bool) -> Report:
    """Check the machine for the configuration of `run`, in the order in which a run would meet what is wrong.

    with_model: also get the model as a run would, open the engine, and compare it with the learner; that may
    take minutes, so each step is said as it begins.
    """
    with TemporaryDirectory(prefix="grpo-doctor-") as scratch:
        report = Report(run.name, Path(scratch), say=run.console.say if with_model else str)
        _look(run, report, with_model)
    return report


def refuse(run: ActiveRun) -> None:
    """Raise the error of the first check that fails; room for all that is to come is not asked for."""
    with TemporaryDirectory(prefix="grpo-doctor-") as scratch:
        report = Report(run.name, Path(scratch))
        _look(run, report, with_model=False, room=False)
    if report.errors:
        raise report.errors[0]


def _look(run: ActiveRun, report: Report, with_model: bool, room: bool = True) -> None:
    config = run.config
    check_run(run, report)
    check_engine(run, report)
    check_execution(run, report, room)
    check_compiler(run, report)
    check_threads(report)
    check_sql(run, report)
    check_signal(run, report)
    reference = policy = check_model(run, report, "model", config.model, with_model)
    check_lora(run, report, policy)
    check_optimizer(run, report)
    check_surrogate(run, report)
    if config.update.reference is not None and config.update.kl_coefficient:
        reference = check_model(run, report, "reference", config.update.reference, with_model)
    found = [check_prompts(run, report, policy, with_model)]
    check_answers(run, report, policy, found[0])
    if config.evaluate is not None:
        found.append(check_prompts(run, report, policy, with_model, HELD_OUT))
        check_held_out(run, report, found[0].rows, found[1].rows)
    check_rewards(run, report, policy, found, with_model)
    check_teachers(run, report, policy, with_model)
    check_evaluation(run, report)
    check_track(run, report)
    check_mirror(run, report, room)
    if room:
        if ("engine options", "failed") not in {(check.name, check.level) for check in report.checks}:
            check_memory(run, report, policy, reference, found[0].longest)
        check_disk(run, report, policy)
        check_overlap(run, report)
    if with_model and report.exit_code:
        with report.check("agreement", "not tried", AGREEMENT) as check:
            check.warn("what failed above comes first")
    elif with_model and policy.folder is not None:
        check_agreement(run, report, policy.folder, found[0].rows)
