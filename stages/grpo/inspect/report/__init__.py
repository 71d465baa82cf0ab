"""report: runs -> one HTML file to read and to send, or a picture of their curves."""

from pathlib import Path
from typing import Any

from grpo import sql
from grpo.artifacts import ActiveRun, files, refuse_inside_run
from grpo.errors import UsageError
from grpo.inspect import outdated
from grpo.inspect.report import curves, overview, rollouts
from grpo.inspect.report.page import page
from grpo.inspect.report.picture import picture

__all__ = ["build", "charts", "write"]


def write(
    runs: list[ActiveRun], out: Path | None, as_picture: bool, num_rollouts: int | None
) -> dict[str, Any]:
    """Write the report, and say what it left out. `out` None: <run>.html, report.html for several runs.

    Raises UsageError (exit 2) for a name or a number that cannot be, and for runs that hold nothing.
    """
    suffix = ".png" if as_picture else ".html"
    path = out or Path((runs[0].name if len(runs) == 1 else "report") + suffix)
    if path.suffix != suffix:
        raise UsageError(f"--out {path}: expected a file ending in {suffix}")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: no folder {path.parent}")
    refuse_inside_run(path)
    if as_picture and num_rollouts is not None:
        raise UsageError("--rollouts: a picture shows curves only; leave it out, or leave out --png")
    for run in runs:
        if not any(run.manifest("rollouts", number) for number in run.iterations()):
            raise UsageError(f"run {run.name}: holds no rollouts yet")
    outdated.say(runs)
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


def charts(runs: list[ActiveRun]) -> list[dict[str, Any]]:
    """The charts of curves.read, all runs in each."""
    return sql.snapshot(runs, lambda connection: curves.read(connection, [run.name for run in runs]))


def build(runs: list[ActiveRun], num_rollouts: int | None) -> tuple[bytes, list[str]]:
    """The page, and for each run that does not fit, what was left out of it."""
    limit = rollouts.limits(num_rollouts, len(runs))
    names = [run.name for run in runs]

    def read(connection: sql.Connection) -> dict[str, Any]:
        chosen = [rollouts.read(connection, run, *limit) for run in runs]
        found = zip(names, chosen, strict=True)
        data = {
            "charts": curves.read(connection, names),
            "runs": [overview.summary(connection, run) for run in runs],
            "left_out": [f"run {name}: {text}" for name, (_, text) in found if text],
        }
        heats = {f"heat-{index}": overview.heat(connection, run) for index, run in enumerate(runs)}
        blocks = {f"rollouts-{index}": block for index, (block, _) in enumerate(chosen)}
        return {"data": data, **heats, **blocks}

    blocks = sql.snapshot(runs, read)
    return page(", ".join(names), blocks), blocks["data"]["left_out"]
