"""tally: how often each fault was tried and how often everything held, as the tests counted it."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

# GRPO_FAULTS=sampled: `make test-faults`. GRPO_LONG: `make test-long`, and the file for its table of counts.
TABLE = os.environ.get("GRPO_LONG", "")
LONG = bool(TABLE)
SAMPLED = LONG or bool(os.environ.get("GRPO_FAULTS"))
if os.environ.get("GRPO_FAULTS", "") not in ("", "sampled"):
    raise ValueError(f"GRPO_FAULTS={os.environ['GRPO_FAULTS']}: expected sampled, or nothing")
ONE_OF_EACH = "one of each kind"
COMMANDS = ("run", "next", "from", "every 3", "lag", "score", "evaluate", "gc", "fork")
ERRORS = ("ENOSPC", "EIO", "EACCES")
CUT_OFF = ("run", "next", "from 0", "every 3", "prune", "gc", "fork")
# Which of each n: others every day, since a sample that is always the same leaves the same ones out.
TURN = date.today().toordinal()
# How much `make test`, `make test-faults` and `make test-long` try. Of operations: each n-th.
EXTENTS: dict[str, tuple[Any, Any, Any]] = {
    "commands with a fault at an operation": (("run", "from", "every 3"), COMMANDS, COMMANDS),
    "operations with SIGKILL": (ONE_OF_EACH, 18, 1),
    "operations with SIGKILL in `rounds`": (ONE_OF_EACH, 70, 1),
    "errors": (ERRORS[:1], ERRORS, ERRORS),
    "operations with each error": (ONE_OF_EACH, 54, 9),
    "commands with a power failure": (("run",), CUT_OFF, CUT_OFF),
    "operations before a power failure": (46, 46, 1),
    "SIGKILL at a random time": (10, 30, 1_000),
    "SIGKILL of a run in lanes": (2, 6, 50),
    "each fault of a worker elsewhere": (1, 1, 250),
    "each fault of a node, a driver and a rank": (1, 1, 50),
    "iterations of a long run": (8, 12, 200),
    "files damaged in each way": (1, 4, 80),
    "SIGINT and SIGTERM, each": (1, 2, 20),
    "two writers at once, each pair": (1, 3, 100),
    "queries of a reader": (40, 60, 5_000),
    "rows of commands by chance": (2, 4, 25),
    "commands in such a row, at most": (6, 8, 20),
}
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


def extent(name: str) -> Any:
    """How much of it is tried now."""
    return EXTENTS[name][2 if LONG else int(SAMPLED)]


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
        *introduction(),
        "## What held",
        "",
        f"By `make test-long` on {os.cpu_count()} cores ({_processor()}), {date.today()}.",
        "",
        "| " + " | ".join(_HEADER) + " |",
        "|---|---|---:|---:|---:|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    Path(TABLE).write_text("\n".join(lines) + "\n")


def introduction() -> list[str]:
    """How the page begins: what each of the three test commands tries."""
    return [
        "# Faults",
        "",
        "How a run was broken on purpose, and how often everything held. An operation is a change on disk: a",
        "write, a rename, a sync and so on. Reward functions that fail and an engine that dies are tried by",
        "`make test` and `make test-long`; a full disk, and each sync removed, by `make test-long` alone.",
        "",
        "| how much | `make test` | `make test-faults` | `make test-long` |",
        "|---|---|---|---|",
        *(
            f"| {name} | {' | '.join(_cell(name, part) for part in parts)} |"
            for name, parts in EXTENTS.items()
        ),
        "",
        "The commands, each on a project whose two iterations are done unless it says otherwise:",
        "",
        *(f"- `{name}`: {text}" for name, text in _COMMANDS.items()),
        "",
    ]


_COMMANDS = {
    "run": "`grpo run`, the first iteration of a new run",
    "next": "`grpo run`, a third iteration, in which a checkpoint is dropped",
    "from": "`grpo run --from 1` with another reward",
    "from 0": "`grpo run --from 0` with another reward, and an output of before in the trash",
    "score": "`grpo score --force` of both iterations",
    "evaluate": "`grpo evaluate` of a policy",
    "gc": "`grpo gc` behind a third iteration and a `--from`",
    "fork": "`grpo fork` from iteration 1",
    "rounds": "`grpo run`, the first iteration of a new run with dynamic sampling",
    "every 3": "`grpo run`, five iterations of a new run whose every third policy is written",
    "lag": "`grpo run`, three iterations of a new run, the second sampled before the first is trained on",
    "prune": "`grpo run`, three iterations of a new run that keeps two checkpoints",
}


def _cell(name: str, part: Any) -> str:
    if isinstance(part, tuple):
        return ", ".join(part)
    if isinstance(part, int) and name.startswith("operations"):
        return "all" if part == 1 else f"every {part}th"
    return f"{part:,}" if isinstance(part, int) else str(part)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
