"""cli.options: what most commands begin with: their common options, and the run that these name."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpo.cli.lazy import artifacts, config, console, prepare, restart
from grpo.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from grpo.artifacts import ActiveRun

Config = Annotated[Path, typer.Option("--config", "-c", help="The configuration.")]
Set = Annotated[list[str], typer.Option("--set", help="Override a key: --set update.learning_rate=1e-6")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Name = Annotated[str, typer.Argument(help="A run, or the path of one; default: that of the configuration.")]
CONFIG = Path("pipeline.yaml")


def configured(path: Path, overrides: Sequence[str], quiet: bool = False) -> "ActiveRun":
    """The run of a configuration, which need not be there yet."""
    values = config.load(path, overrides)
    return artifacts.ActiveRun(artifacts.ARTIFACTS, values, path.absolute().parent, console.Console(quiet))


def chosen(name: str, path: Path, overrides: Sequence[str], quiet: bool) -> "ActiveRun":
    """The run to work on: one that is there, by name, else that of the configuration, which need not be."""
    return reading(name, path, overrides, quiet=quiet) if name else configured(path, overrides, quiet)


@contextmanager
def working(name: str, path: Path, overrides: list[str], quiet: bool) -> Iterator["ActiveRun"]:
    """The run of a configuration, or one that is there by name; locked and prepared for work."""
    with locked(chosen(name, path, overrides, quiet)) as opened:
        prepare.prepare(opened)
        restart.finish_start_over(opened)
        yield opened


@contextmanager
def locked(opened: "ActiveRun") -> Iterator["ActiveRun"]:
    """A run that nobody else works on, with every commit finished that a crash cut off."""
    with opened.console.signals(), opened.lock():
        artifacts.roll_forward(opened)
        yield opened


def reading(
    name: str, path: Path, overrides: Sequence[str] = (), damaged: bool = False, quiet: bool = False
) -> "ActiveRun":
    """A run that is there, by name or path of its folder, else that of the configuration at `path`.

    Its configuration is the one at `path` where that names this run, else the pipeline.yaml in its folder,
    which a fork has, else run.json. `overrides` apply to any. damaged: run.json need only be there.
    """
    if not name and not path.exists():
        raise UsageError(f"{path}: no such file; name a run, or give a configuration with -c FILE")
    run = configured(path, overrides, quiet) if path.exists() else None
    folder = artifacts.find_run(name or str(run.path if run else ""))
    if run is None or not artifacts.same_folder(folder, run.path):
        run = _by_its_own(folder, path, overrides, damaged, quiet)
    elif not damaged:
        artifacts.open_run(folder)
    return run


def _by_its_own(
    folder: Path, path: Path, overrides: Sequence[str], damaged: bool, quiet: bool
) -> "ActiveRun":
    own = folder / config.PIPELINE
    try:
        if own.is_file():
            values = config.load(own, overrides).model_copy(update={"run": folder.name})
            if not damaged:
                artifacts.open_run(folder)
        else:
            values = artifacts.created_config(folder, overrides)
    except CorruptError as error:
        way = (
            f"; with its pipeline.yaml, `grpo verify -c FILE --set run={folder.name} --discard` sets it aside"
        )
        raise CorruptError(f"{error}{way if damaged else ''}") from None
    return artifacts.ActiveRun(folder.parent, values, path.absolute().parent, console.Console(quiet))


def reading_all(names: list[str], path: Path) -> list["ActiveRun"]:
    """Each of the named runs once, to read; that of the configuration where none is named."""
    runs: list[ActiveRun] = []
    for run in (reading(name, path) for name in names or [""]):
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
