"""cli: the command `grpo`, every command on one screen. Data goes to stdout, everything else to stderr.

Nothing heavy is imported before a command runs.
"""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpo.errors import CorruptError, GrpoError, ResourceError, UsageError

if TYPE_CHECKING:
    from grpo.artifacts import Run

app = typer.Typer(
    help="GRPO as a data pipeline: generate -> score -> advantage -> update, every stage a table on disk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The configuration.")]
SetOption = Annotated[
    list[str], typer.Option("--set", help="Override a key: --set update.learning_rate=1e-6")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
StageIteration = Annotated[str, typer.Option("--iteration", help="3, 0-19 or all; default: the next to do.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Do it again, also where nothing is missing.")]
RunArgument = Annotated[str, typer.Argument(help="Name of a run; default: that of the configuration.")]
CONFIG = Path("pipeline.yaml")
_INTERRUPTED = 130
_MESSAGE_CHARACTERS = 2000  # of an error: a value that it quotes may be of any length


@app.command()
def run(
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006 - typer reads the default, nothing changes it
    until: Annotated[int | None, typer.Option(help="Until N iterations are complete.")] = None,
    from_: Annotated[
        int | None, typer.Option("--from", help="Do what is stale in N, and all later, again.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --from: do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show the resolved configuration and what is done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Every iteration, resuming by itself: what is complete is not done again."""
    from grpo import commands

    if yes and from_ is None:
        raise UsageError("--yes: says yes to what `--from N` asks; give both or neither")
    if dry_run:
        if from_ is not None:
            raise UsageError("--dry-run: --from N says itself what it will do, and asks; give one of them")
        commands.dry_run(_run(config, set_, as_json))
        return
    with _working(config, set_, as_json) as opened:
        result = commands.run(opened, until, from_, yes)
    if as_json:
        _print_json(result)


def _stage_command(name: str, summary: str) -> None:
    def command(
        config: ConfigOption = CONFIG,
        set_: SetOption = [],  # noqa: B006
        iteration: StageIteration = "",
        force: ForceOption = False,
        as_json: JsonOption = False,
    ) -> None:
        from grpo import commands

        with _working(config, set_, as_json) as opened:
            result = commands.run_stage(opened, name, iteration, force)
        if as_json:
            _print_json(result)

    app.command(name, help=summary)(command)


_stage_command("generate", "Stage 1: policy + prompts -> rollouts.")
_stage_command("score", "Stage 2: rollouts + prompts -> rewards.")
_stage_command("advantage", "Stage 3: rollouts + rewards -> advantages.")
_stage_command("update", "Stage 4: policy + rollouts + advantages -> next policy.")


@app.command()
def status(
    name: RunArgument = "",
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    every: Annotated[bool, typer.Option("--all", help="Every iteration, not only the last.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Iterations x stages: done, partial, stale, differs, missing; reward, KL, length, seconds."""
    from grpo import status as status_module

    opened = _reading(name, config, set_)
    if as_json:
        _print_json(status_module.describe(opened))
    else:
        status_module.print_status(opened, every)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="A query; none: an interactive prompt.")] = "",
    config: ConfigOption = CONFIG,
    names: Annotated[list[str], typer.Option("--run", help="A run to open; may be given again.")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write to a .parquet, .csv or .json file.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Seconds a query may take.")] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Read-only SQL over the tables of runs, and over samples, timings and manifests."""
    from grpo import query as query_module

    runs = [_reading(name, config, []) for name in dict.fromkeys(names or [""])]
    query_module.answer(runs, query, out, timeout_s, as_json)


@app.command()
def show(
    name: RunArgument = "",
    config: ConfigOption = CONFIG,
    iteration: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over samples.")] = None,
    groups: Annotated[int, typer.Option(help="How many prompts.", min=1)] = 3,
    as_json: JsonOption = False,
) -> None:
    """Read rollouts as a person: prompt, its K responses, rewards, advantages."""
    from grpo import show as show_module

    rows = show_module.fetch(_reading(name, config, []), iteration, where, groups)
    if as_json:
        _print_json(rows)
    else:
        show_module.print_rollouts(rows)


@app.command()
def doctor(
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    model: Annotated[
        bool, typer.Option("--model", help="Open the engine and compare it with the learner.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this machine for what the configuration needs; makes no run."""
    from grpo import doctor as doctor_module

    report = doctor_module.examine(_run(config, set_, as_json), model)
    if as_json:
        _print_json(report.describe())
    else:
        doctor_module.print_report(report)
    raise typer.Exit(report.exit_code)


@app.command()
def verify(
    name: RunArgument = "",
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    discard: Annotated[bool, typer.Option("--discard", help="Move what is damaged to .trash.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Every hash, schema and invariant of a run; what is damaged, and what to do about it."""
    from grpo import verify as verify_module

    opened = _reading(name, config, set_, damaged=True)
    # What a crash cut off is not finished first: that may be what is damaged.
    with opened.lock() if discard else nullcontext():
        report = verify_module.verify(opened)
        if discard:
            verify_module.discard_damaged(opened, report)
    if as_json:
        _print_json({"run": opened.name, **report.describe()})
    else:
        verify_module.print_report(opened, report, discard)
    raise typer.Exit(report.exit_code)


@app.command()
def gc(
    name: RunArgument = "",
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option(help="Show it, remove nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove the trash, abandoned staging, and checkpoints that `checkpoints` does not keep."""
    from grpo import collect

    opened = _reading(name, config, set_)
    with nullcontext() if dry_run else _locked(opened):
        found = collect.garbage(opened) if dry_run else collect.collect(opened)
    if as_json:
        _print_json(collect.describe(found, opened, dry_run))
    else:
        collect.print_garbage(found, opened, dry_run)


@app.command()
def fork(
    source: Annotated[str, typer.Argument(help="Name of the run to begin as.")],
    new: Annotated[str, typer.Argument(help="Name of the new run.")],
    config: ConfigOption = CONFIG,
    set_: SetOption = [],  # noqa: B006
    iteration: Annotated[int | None, typer.Option(help="The first to differ; default: the next one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A run that shares another one's first iterations, by hard links, and goes on in its own way."""
    from grpo import fork as fork_module

    forked = _run(config, [*set_, f"run={new}"], as_json)
    result = fork_module.fork(_reading(source, config, []), forked, iteration)
    if as_json:
        _print_json({"run": new, "from": source, **result})
    else:
        options = shlex.join(part for text in [*set_, f"run={new}"] for part in ("--set", text))
        forked.console.say(f"{fork_module.describe(source, new, result)}; go on with: grpo run {options}")


def _run(path: Path, overrides: list[str], quiet: bool) -> "Run":
    from grpo.artifacts import ARTIFACTS, Run
    from grpo.config import load
    from grpo.console import Console

    return Run(ARTIFACTS, load(path, overrides), path.absolute().parent, Console(quiet))


@contextmanager
def _working(path: Path, overrides: list[str], quiet: bool) -> Iterator["Run"]:
    """The run of a configuration, locked and prepared for work."""
    from grpo import runner, start

    opened = _run(path, overrides, quiet)
    with _locked(opened):
        start.prepare(opened)
        runner.finish_start_over(opened)
        yield opened


@contextmanager
def _locked(opened: "Run") -> Iterator[None]:
    """A run that nobody else works on, with every commit finished that a crash cut off."""
    from grpo.artifacts import roll_forward

    with opened.console.signals(), opened.lock():
        roll_forward(opened)
        yield


def _reading(name: str, path: Path, overrides: list[str], damaged: bool = False) -> "Run":
    """A run to read: that of the configuration, or by name with the configuration it was created with.

    `overrides` apply to either. damaged: of the former, run.json need only be there.
    """
    from grpo.artifacts import ARTIFACTS, Run, created_config, open_run, require_run
    from grpo.console import Console

    if not name and not path.exists():
        raise UsageError(f"{path}: no such file; name a run, or give a configuration with -c FILE")
    if not name or (path.exists() and _run(path, overrides, True).name == name):
        configured = _run(path, overrides, False)
        require_run(configured.name) if damaged else open_run(configured.name)
        return configured
    if overrides:
        overrides = [*overrides, f"run={name}"]  # the name of a run that is there cannot be another
    try:
        config = created_config(name, overrides=overrides)
    except CorruptError as error:
        if not damaged:
            raise
        way = f"with its pipeline.yaml, `grpo verify -c FILE --set run={name} --discard` sets it aside"
        raise CorruptError(f"{error}; {way}") from None
    return Run(ARTIFACTS, config, path.absolute().parent, Console())


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False, default=str))


def main() -> None:
    """Run the command line; a GrpoError ends it with one line on stderr and its exit code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it once, when it is imported
    usage_error: Any = typer.BadParameter.__mro__[2]  # ClickException of the click inside typer
    try:
        code = app(standalone_mode=False) or 0
        if code == _INTERRUPTED:  # typer makes this of a KeyboardInterrupt
            _fail("interrupted", code)
        sys.exit(code)
    except GrpoError as error:
        _fail(str(error), error.exit_code)
    except usage_error as error:
        message = error.format_message()
        if not message:  # `grpo` alone: the help is printed already
            sys.exit(2)
        _fail(f"{message.rstrip('.')}; see `grpo --help`", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # `grpo sql ... | head`: the reader has seen enough
        sys.exit(0)
    except OSError as error:
        if error.filename is None:
            raise
        # No rights, a file in a folder's place, a path too long: the user's to mend, wherever it shows.
        _fail(f"{error.filename}: {error.strerror}", ResourceError.exit_code)


def _fail(message: str, code: int) -> None:
    from grpo.console import printable

    if len(message) > _MESSAGE_CHARACTERS:  # where it was and what would be right are at its ends
        half = _MESSAGE_CHARACTERS // 2
        message = f"{message[:half]} ... {message[-half:]}"
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "exit": code}), file=sys.stderr)
    else:
        print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)
