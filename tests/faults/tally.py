"""tally: how often each fault was tried and how often everything held, as the tests counted it."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

Extent = TypeVar("Extent")

# How much is tried: by `make test` one point of each kind; by `make test-faults` a sample of all points, with
# GRPO_FAULTS=sampled; by `make test-long` every point, and GRPO_LONG names the file for the table of counts.
TABLE = os.environ.get("GRPO_LONG", "")
LONG = bool(TABLE)
SAMPLED = LONG or bool(os.environ.get("GRPO_FAULTS"))
if os.environ.get("GRPO_FAULTS", "") not in ("", "sampled"):
    raise ValueError(f"GRPO_FAULTS={os.environ['GRPO_FAULTS']}: expected sampled, or nothing")
_PROPERTY = "fault"
_HEADER = ("fault", "where", "there are", "tried", "held")


class Tally:
    """A row of the table. of: how many there are to try, where that is a number."""

    def __init__(self, record: Callable[[str, object], None], fault: str, where: str, of: int | None) -> None:
        self._row: dict[str, Any] = {"fault": fault, "where": where, "of": of, "tried": 0, "held": 0}
        record(_PROPERTY, self._row)  # the report is made after the test: it will hold the counts

    @contextmanager
    def trial(self, count: int = 1) -> Iterator[None]:
        """Count what a `with` block tries; it held when nothing is raised."""
        self._row["tried"] += count
        yield
        self._row["held"] += count


def extent(one: Extent, sampled: Extent, full: Extent) -> Extent:
    """What `make test`, `make test-faults` and `make test-long` try."""
    return full if LONG else sampled if SAMPLED else one


def chosen(count: int, every: int) -> list[int]:
    """Numbers from 1 to count: each `every`-th, or all of them in the long test."""
    return list(range(1, count + 1, 1 if LONG else every))


def rows_of(reports: list[Any]) -> list[tuple[str, ...]]:
    """The table, as texts, from the reports of tests."""
    rows = [value for report in reports for name, value in report.user_properties if name == _PROPERTY]
    return [
        (
            row["fault"],
            row["where"],
            "" if row["of"] is None else f"{row['of']:,}",
            f"{row['tried']:,}",
            f"{row['held']:,}",
        )
        for row in sorted(rows, key=lambda row: (row["fault"], row["where"]))
    ]


def print_table(rows: list[tuple[str, ...]], write_line: Callable[[str], None]) -> None:
    """The table with aligned columns."""
    widths = [max(len(row[column]) for row in [_HEADER, *rows]) for column in range(len(_HEADER))]
    for row in [_HEADER, *rows]:
        texts = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        write_line("  ".join(texts).rstrip())


def write_table(rows: list[tuple[str, ...]]) -> None:
    """The table as a page of the documentation, with the machine and the day."""
    lines = [
        "# Faults, as last counted",
        "",
        f"By `make test-long` on {os.cpu_count()} cores ({_processor()}), {date.today()}.",
        "",
        "| " + " | ".join(_HEADER) + " |",
        "|---|---|---:|---:|---:|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    Path(TABLE).write_text("\n".join(lines) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
