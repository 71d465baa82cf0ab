"""cli.options: what most commands begin with: their common options, and the run that these name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpo.cli.lazy import artifacts, config, console, prepare, restart
from grpo.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from grpo.artifacts import ActiveRun

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The configuration.")]
SetOption = Annotated[
    list[str], typer.Option("--set", help="Override a key: --set update.learning_rate=1e-6")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
RunArgument = Annotated[str, typer.Argument(help="Name of a run; default: that of the configuration.")]
CONFIG = Path("pipeline.yaml")


def configured(path: Path, overrides: list[str], quiet: bool) -> "ActiveRun":
    """The run of a configuration, which need not be there yet."""
    values = config.load(path, overrides)
    return artifacts.ActiveRun(artifacts.ARTIFACTS, values, path.absolute().parent, console.Console(quiet))


@contextmanager
def working(path: Path, overrides: list[str], quiet: bool) -> Iterator["ActiveRun"]:
    """The run of a configuration, locked and prepared for work."""
    opened = configured(path, overrides, quiet)
    with locked(opened):
        prepare.prepare(opened)
        restart.finish_start_over(opened)
        yield opened


@contextmanager
def locked(opened: "ActiveRun") -> Iterator["ActiveRun"]:
    """A run that nobody else works on, with every commit finished that a crash cut off."""
    with opened.console.signals(), opened.lock():
        artifacts.roll_forward(opened)
        yield opened


def reading(name: str, path: Path, overrides: list[str], damaged: bool = False) -> "ActiveRun":
    """A run to read: that of the configuration, or by name with the configuration it was created with.

    `overrides` apply to either. damaged: of the former, run.json need only be there.
    """
    if not name and not path.exists():
        raise UsageError(f"{path}: no such file; name a run, or give a configuration with -c FILE")
    if not name or (path.exists() and configured(path, overrides, True).name == name):
        run = configured(path, overrides, False)
        artifacts.require_run(run.name) if damaged else artifacts.open_run(run.name)
        return run
    if overrides:
        overrides = [*overrides, f"run={name}"]  # the name of a run that is there cannot be another
    try:
        created = artifacts.created_config(name, overrides=overrides)
    except CorruptError as error:
        if not damaged:
            raise
        way = f"with its pipeline.yaml, `grpo verify -c FILE --set run={name} --discard` sets it aside"
        raise CorruptError(f"{error}; {way}") from None
    return artifacts.ActiveRun(artifacts.ARTIFACTS, created, path.absolute().parent, console.Console())


def print_json(document: Any) -> None:
    """Print the one document of `--json`."""
    print(json.dumps(document, indent=1, allow_nan=False, default=str))
