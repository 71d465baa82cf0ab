"""doctor: is everything here that a configuration needs? Looks and tries, makes no run and takes no lock."""

from grpo.artifacts import ActiveRun
from grpo.manage.doctor.engine import AGREEMENT, check_agreement, check_engine
from grpo.manage.doctor.inputs import (
    check_held_out,
    check_lora,
    check_model,
    check_optimizer,
    check_prompts,
    check_rewards,
    check_surrogate,
)
from grpo.manage.doctor.report import Report, print_report
from grpo.manage.doctor.space import check_disk, check_memory
from grpo.prompts.table import HELD_OUT

__all__ = ["Report", "examine", "print_report"]


def examine(run: ActiveRun, with_model: bool) -> Report:
    """Check the machine for the configuration of `run`, in the order in which a run would meet what is wrong.

    with_model: also get the model as a run would, open the engine, and compare it with the learner.
    """
    config, report = run.config, Report(run.name)
    check_engine(run, report)
    reference = policy = check_model(run, report, "model", config.model, with_model)
    check_lora(run, report, policy)
    check_optimizer(run, report)
    check_surrogate(run, report)
    if config.update.reference is not None and config.update.kl_coefficient:
        reference = check_model(run, report, "reference", config.update.reference, with_model)
    if ("engine options", "failed") not in {(check.name, check.level) for check in report.checks}:
        check_memory(run, report, policy, reference)
    check_disk(run, report, policy)
    rows = check_prompts(run, report, policy, with_model)
    if config.evaluate is not None:
        check_held_out(run, report, rows, check_prompts(run, report, policy, with_model, HELD_OUT))
    check_rewards(run, report, rows, with_model)
    if with_model and report.exit_code:
        with report.check("agreement", "not tried", AGREEMENT) as check:
            check.warn("what failed above comes first")
    elif with_model and policy.folder is not None:
        check_agreement(run, report, policy.folder, rows)
    return report
