"""cli.options: what most commands begin with: their common options, and the run that these name."""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpo.cli.lazy import artifacts, console, opening
from grpo.errors import UsageError, listed

if TYPE_CHECKING:
    from grpo.artifacts import ActiveRun

Config = Annotated[Path, typer.Option("--config", "-c", help="The configuration.")]
Set = Annotated[list[str], typer.Option("--set", help="Override a key: --set update.learning_rate=1e-6")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
AcceptReplay = Annotated[
    bool, typer.Option("--accept-replay", help="Go on though a policy is rebuilt with other bits.")
]
Name = Annotated[str, typer.Argument(help="A run, or the path of one; default: that of the configuration.")]
CONFIG = Path("pipeline.yaml")
TIMEOUT_S = 600.0  # sql.TIMEOUT_S, whose import takes its time


def _seconds(given: float) -> float:
    if not 0 < given <= threading.TIMEOUT_MAX:  # NaN is not
        raise UsageError(f"--timeout-s {given:g}: expected seconds, more than 0 and finite")
    return given


Timeout = Annotated[float, typer.Option(help="Seconds a query may take.", callback=_seconds)]


def chosen(name: str, path: Path, overrides: Sequence[str], quiet: bool) -> "ActiveRun":
    """The run to work on: one that is there, by name, else that of the configuration, which need not be."""
    return reading(name, path, overrides, quiet=quiet) if name else opening.configured(path, overrides, quiet)


def reading(
    name: str, path: Path, overrides: Sequence[str] = (), damaged: bool = False, quiet: bool = False
) -> "ActiveRun":
    """A run that is there, by name or path of its folder, else that of the configuration at `path`.

    Its configuration is the one at `path` where that names this run, else the pipeline.yaml in its folder,
    which a fork has, else run.json. `overrides` apply to any. damaged: run.json need only be there.
    """
    given, (name, *others) = name, artifacts.find_runs(name) if name else [""]
    if others:
        raise UsageError(f"{given}: means {listed([name, *others], given)}; this command takes one run")
    if not name and not path.exists():
        way = "name a run, or give a configuration with -c FILE"
        begin = "`grpo init` makes a project here; or " if path == CONFIG else ""
        raise UsageError(f"{path}: no such file; {begin}{way}")
    run = opening.configured(path, overrides, quiet) if path.exists() else None
    folder = artifacts.find_run(name or str(run.path if run else ""))
    if run is None or not artifacts.same_folder(folder, run.path):
        own = artifacts.own_config(folder, overrides, damaged)
        run = artifacts.ActiveRun(folder.parent, own, path.absolute().parent, console.Console(quiet))
    elif not damaged:
        artifacts.open_run(folder)
    return run


def reading_all(names: list[str], path: Path) -> list["ActiveRun"]:
    """Each of the named runs once, patterns as `lr-*` too, to read; that of the configuration for none."""
    runs: list[ActiveRun] = []
    named = [run for name in names for run in artifacts.find_runs(name)]
    for run in (reading(name, path) for name in named or [""]):
        if not any(artifacts.same_folder(run.path, other.path) for other in runs):
            runs.append(run)
    artifacts.tell_apart(runs)
    return runs


def answer(as_json: bool, document: Any, show: Callable[[], object] = lambda: None) -> None:
    """Print the one document of `--json`, or show a person what is in it."""
    if as_json:
        print(json.dumps(document, indent=1, allow_nan=False, default=str))
    else:
        show()
