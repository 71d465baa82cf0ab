"""cli.options: what most commands begin with: their common options, and the run that these name."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpo.cli.lazy import artifacts, console, opening
from grpo.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from grpo.artifacts import ActiveRun

Config = Annotated[Path, typer.Option("--config", "-c", help="The configuration.")]
Set = Annotated[list[str], typer.Option("--set", help="Override a key: --set update.learning_rate=1e-6")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Name = Annotated[str, typer.Argument(help="Name of a run; default: that of the configuration.")]
CONFIG = Path("pipeline.yaml")


def reading(name: str, path: Path, overrides: Sequence[str] = (), damaged: bool = False) -> "ActiveRun":
    """A run to read: that of the configuration, or by name with the configuration it was created with.

    `overrides` apply to either. damaged: of the former, run.json need only be there.
    """
    if not name and not path.exists():
        raise UsageError(f"{path}: no such file; name a run, or give a configuration with -c FILE")
    if path.exists() and (run := opening.configured(path, overrides)).name == (name or run.name):
        artifacts.require_run(run.name) if damaged else artifacts.open_run(run.name)
        return run
    if overrides:
        overrides = [*overrides, f"run={name}"]  # the name of a run that is there cannot be another
    try:
        created = artifacts.created_config(name, overrides=overrides)
    except CorruptError as error:
        way = f"; with its pipeline.yaml, `grpo verify -c FILE --set run={name} --discard` sets it aside"
        raise CorruptError(f"{error}{way if damaged else ''}") from None
    return artifacts.ActiveRun(artifacts.ARTIFACTS, created, path.absolute().parent, console.Console())


def reading_all(names: list[str], path: Path) -> list["ActiveRun"]:
    """Each of the named runs once, to read; that of the configuration where none is named."""
    return [reading(name, path) for name in dict.fromkeys(names or [""])]


def answer(as_json: bool, document: Any, show: Callable[[], object] = lambda: None) -> None:
    """Print the one document of `--json`, or show a person what is in it."""
    if as_json:
        print(json.dumps(document, indent=1, allow_nan=False, default=str))
    else:
        show()
