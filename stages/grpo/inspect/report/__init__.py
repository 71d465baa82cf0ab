"""report: runs -> one HTML file to read and to send, or a picture of their curves."""

from pathlib import Path
from typing import Any

from grpo import sql
from grpo.artifacts import Run, files
from grpo.errors import UsageError
from grpo.inspect.report import curves, heat, rollouts, summary
from grpo.inspect.report.curve_list import CURVES
from grpo.inspect.report.page import page
from grpo.inspect.report.picture import picture
from grpo.inspect.report.selection import limits

__all__ = ["build", "charts", "write"]

# What curves and map ask for again and again, read from the files once. Lists and long texts stay there:
# whoever needs them asks memory.main.rollouts.
_LOADED = {
    "rollouts": "run, iteration, group_id, sample_id, prompt_id, finish_reason, response_tokens",
    "rewards": "*",
    "advantages": "*",
    "updates": "*",
}


def write(runs: list[Run], out: Path | None, as_picture: bool, num_rollouts: int | None) -> dict[str, Any]:
    """Write the report, and say what it left out. `out` None: <run>.html, report.html for several runs.

    Raises UsageError (exit 2) for a name or a number that cannot be, and for runs that hold nothing.
    """
    suffix = ".png" if as_picture else ".html"
    path = out or Path((runs[0].name if len(runs) == 1 else "report") + suffix)
    if path.suffix != suffix:
        raise UsageError(f"--out {path}: expected a file ending in {suffix}")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: no folder {path.parent}")
    if as_picture and num_rollouts is not None:
        raise UsageError("--rollouts: a picture shows curves only; leave it out, or leave out --png")
    for run in runs:
        if not any(run.manifest("rollouts", number) for number in run.iterations()):
            raise UsageError(f"run {run.name}: holds no rollouts yet")
    left_out: list[str] = []
    if as_picture:
        content = picture(charts(runs), [run.name for run in runs])
    else:
        content, left_out = build(runs, num_rollouts)
    files.write_file(path, content)
    for text in left_out:
        runs[0].console.say(f"report: {text}; --rollouts N changes it, the curves count all")
    runs[0].console.say(f"report: {path}, {len(content) / 2**20:.1f} MiB")
    return {"file": str(path), "bytes": len(content), "left_out": left_out}


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """The charts of curves.read, all runs in each."""

    def read(connection: sql.Connection) -> list[dict[str, Any]]:
        _load(connection)
        return curves.read(connection, [run.name for run in runs], CURVES)

    return sql.consult(runs, read)


def build(runs: list[Run], num_rollouts: int | None) -> tuple[bytes, list[str]]:
    """The page, and for each run that does not fit, what was left out of it."""
    limit = limits(num_rollouts).shared_by(len(runs))

    def read(connection: sql.Connection) -> tuple[Any, ...]:
        _load(connection)
        return (
            curves.read(connection, [run.name for run in runs], CURVES),
            [summary.read(connection, run) for run in runs],
            [heat.read(connection, run) for run in runs],
            [rollouts.read(connection, run, limit) for run in runs],
        )

    drawn, summaries, heats, found = sql.consult(runs, read)
    left_out = [
        f"run {run.name}: {text}"
        for run, (_, chosen) in zip(runs, found, strict=True)
        if (text := chosen.left_out())
    ]
    document = {"charts": drawn, "runs": summaries, "left_out": left_out}
    title = ", ".join(run.name for run in runs)
    return page(title, document, heats, [block for block, _ in found]), left_out


def _load(connection: sql.Connection) -> None:
    for table, columns in _LOADED.items():
        sql.register(connection, table, sql.query(connection, f"select {columns} from memory.main.{table}"))
