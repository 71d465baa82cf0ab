"""report: all checks in the order a run would meet them, as a table or as plain data."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from grpo.artifacts import ActiveRun
from grpo.console import finite, printable, stdout_console, table
from grpo.manage.doctor.check import Check
from grpo.manage.doctor.checkpoint import Checkpoint, check_lora, check_model
from grpo.manage.doctor.disk import check_space
from grpo.manage.doctor.engine import check_engine
from grpo.manage.doctor.inputs import check_prompts, check_rewards
from grpo.manage.doctor.memory import check_memory
from grpo.prompts.source import Row
from grpo.prompts.table import HELD_OUT

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_NUMBERS = {
    "engine": "",
    "device": "",
    "precision": "",
    "temperature": "g",
    "rollouts": "d",
    "tokens": "d",
    "mismatch_mean": ".2e",
    "mismatch_max": ".2e",
    "mismatch_kl": ".2e",
    "effective_sample_size": ".6f",
    "largest_ratio_error": ".2e",
    "weight_check_difference": ".2e",
}


@dataclass
class Report:
    """What was found. `agreement`: the numbers of --model, empty without."""

    run: str
    checks: list[Check] = field(default_factory=list)
    agreement: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """Of the first check that failed, else 0."""
        return next((check.exit_code for check in self.checks if check.level == "failed"), 0)

    def describe(self) -> dict[str, Any]:
        """As one JSON document; a number that is not finite is null."""
        numbers = finite(self.agreement)
        checks = [asdict(check) for check in self.checks]
        return {"run": self.run, "exit": self.exit_code, "checks": checks, "agreement": numbers or None}


def examine(run: ActiveRun, with_model: bool) -> Report:
    """Check the machine for the configuration of `run`.

    with_model: also get the model as a run would, open the engine, and compare it with the learner.
    """
    config, report = run.config, Report(run.name, check_engine(run))
    check, policy = check_model(run, "model", config.model, with_model)
    report.checks += [check, *check_lora(run, policy)]
    reference = policy
    if config.update.reference is not None and config.update.kl_coefficient:
        check, reference = check_model(run, "reference", config.update.reference, with_model)
        report.checks.append(check)
    if not any(check.name == "engine options" and check.level == "failed" for check in report.checks):
        report.checks += check_memory(run, policy, reference)
    report.checks += check_space(run, policy)
    check, rows = check_prompts(run, policy, with_model)
    report.checks.append(check)
    if config.evaluate is not None:
        report.checks.append(check_prompts(run, policy, with_model, HELD_OUT)[0])
    report.checks += check_rewards(run, rows, with_model)
    if with_model:
        _compare(run, report, policy, rows)
    return report


def _compare(run: ActiveRun, report: Report, policy: Checkpoint, rows: list[Row]) -> None:
    needed = "engine and learner compute the same"
    if report.exit_code:
        note = "what failed above comes first"
        report.checks.append(Check("agreement", "not tried", needed, "warning", note))
        return
    from grpo.manage.doctor.agreement import check_agreement

    assert policy.folder is not None
    checks, report.agreement = check_agreement(run, policy.folder, rows)
    report.checks += checks


def print_report(report: Report) -> None:
    """The table, the numbers of --model, what would be right, and a last line that sums up."""
    from rich.text import Text

    columns = ("check", "found", "needed", "")
    cells = [
        [check.name, check.found, check.needed, Text(check.level, _STYLES[check.level], no_wrap=True)]
        for check in report.checks
    ]
    console = stdout_console()
    console.print(table(columns, cells, left=columns))
    if report.agreement:
        _print_numbers(console, report.agreement)
    notes = dict.fromkeys((check.level, check.name, check.note) for check in report.checks if check.note)
    for level, name, note in sorted(notes, key=lambda item: list(_STYLES).index(item[0])):
        mark = "note" if level == "ok" else level
        style = "dim" if level == "ok" else _STYLES[level]
        console.print(Text(mark, style=style) + Text(printable(f"  {name}: {note}")), soft_wrap=True)
    console.print(_sum_up(report), style=_STYLES["failed" if report.exit_code else "ok"], highlight=False)


def _print_numbers(console: "RichConsole", numbers: dict[str, Any]) -> None:
    width = max(map(len, _NUMBERS))
    for name, form in _NUMBERS.items():
        console.print(f"{name:<{width}}  {numbers[name]:{form}}", markup=False, highlight=False)


def _sum_up(report: Report) -> str:
    count = {level: sum(check.level == level for check in report.checks) for level in _STYLES}
    warnings = f", {count['warning']} warnings" if count["warning"] else ""
    if report.exit_code:
        return f"run {report.run}: {count['failed']} of {len(report.checks)} checks failed{warnings}"
    return f"run {report.run}: everything that it needs is here{warnings}"
