"""report: what `grpo doctor` looked at and found, as a table or as plain data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from grpo.console import finite, printable, stdout_console, table
from grpo.errors import GrpoError

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


@dataclass
class Check:
    """One thing that was looked at. Example: Check("disk space", "59.2 GiB free", "1.2 GiB to come")."""

    name: str
    found: str
    needed: str = ""
    level: Literal["ok", "warning", "failed"] = "ok"
    note: str = ""
    """What would be right, where the level is not ok; else what is left out."""
    exit_code: int = 0
    """What a run would exit with; 0 unless failed."""

    def warn(self, note: str) -> None:
        """Not as it should be, though a run would begin."""
        self.level, self.note = "warning", note


@dataclass
class Report:
    """What was found. `agreement`: the numbers of --model, empty without; `errors`: of what failed.

    `scratch`: a folder that is removed behind the report.
    """

    run: str
    scratch: Path
    checks: list[Check] = field(default_factory=list)
    agreement: dict[str, Any] = field(default_factory=dict)
    errors: list[GrpoError] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    """Of the models that were found, by the name of their check."""
    say: Callable[[str], object] = str
    """Told what is looked at now, as it is begun."""

    @contextmanager
    def check(self, name: str, found: str, needed: str = "") -> Iterator[Check]:
        """A check that fails with the GrpoError of its `with` block, which says what would be right."""
        check = Check(name, found, needed)
        self.say(f"doctor: {name}")
        try:
            yield check
        except GrpoError as error:
            check.level, check.note, check.exit_code = "failed", str(error), error.exit_code
            self.errors.append(error)
        self.checks.append(check)

    @property
    def exit_code(self) -> int:
        """Of the first check that failed, else 0."""
        return next((check.exit_code for check in self.checks if check.level == "failed"), 0)

    def describe(self) -> dict[str, Any]:
        """As one JSON document; a number that is not finite is null."""
        checks = [asdict(check) for check in self.checks]
        numbers = finite(self.agreement) or None
        return {"run": self.run, "exit": self.exit_code, "checks": checks, "agreement": numbers}


def print_report(report: Report) -> None:
    """The table, the numbers of --model, what would be right, and a last line that sums up."""
    columns = ("check", "found", "needed", "")
    cells = [
        [check.name, check.found, check.needed, Text(check.level, _STYLES[check.level], no_wrap=True)]
        for check in report.checks
    ]
    console = stdout_console()
    console.print(table(columns, cells, left=columns))
    width = max(map(len, report.agreement), default=0)
    for name, value in report.agreement.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        console.print(f"{name:<{width}}  {shown}", markup=False, highlight=False)
    notes = dict.fromkeys((check.level, check.name, check.note) for check in report.checks if check.note)
    for level, name, note in sorted(notes, key=lambda item: list(_STYLES).index(item[0])):
        mark, style = ("note", "dim") if level == "ok" else (level, _STYLES[level])
        console.print(Text(mark, style=style) + Text(printable(f"  {name}: {note}")), soft_wrap=True)
    count = {level: sum(check.level == level for check in report.checks) for level in _STYLES}
    warned = f"{count['warning']} warning{'' if count['warning'] == 1 else 's'}" if count["warning"] else ""
    found, level = "everything that it needs is here", "ok"
    if report.exit_code:
        found, level = f"{count['failed']} of {len(report.checks)} checks failed", "failed"
        found += f", {warned}" if warned else ""
    elif warned:
        found, level = f"it can begin; read the {warned} first", "warning"
    console.print(f"run {report.run}: {found}", style=_STYLES[level], highlight=False)
