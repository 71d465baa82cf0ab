"""cli.ranks: a command on several processes, as torchrun starts them: rank 0 is it, the others serve it."""

import os
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from grpo.cli.lazy import console
from grpo.errors import GrpoError, UsageError

if TYPE_CHECKING:
    from grpo.artifacts import ActiveRun
    from grpo.update.parallel import Ended, Ranks

_COMMANDS = ("run", "update", "verify")
_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def are_several() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of several."""
    return all(name in os.environ for name in _VARIABLES) and os.environ.get("WORLD_SIZE", "1") != "1"


def serve() -> "Ended | None":
    """On all processes but rank 0: what its learner asks for, until it ends; None: this one is the command.

    The first signal is rank 0's to follow, the second ends this process too.
    """
    if not are_several() or (group := _group()).rank == 0:
        return None
    with console.Console(quiet=True).signals():
        return group.follow()


def end(exit_code: int, line: str = "") -> None:
    """Tell the others that this process ends, and with what.

    They wait for the group of a command that succeeds without one, such as `--help`; where it fails, torchrun
    ends them.
    """
    if are_several() and (_group.cache_info().currsize or not exit_code):
        with suppress(GrpoError, RuntimeError):  # who cannot be told knows by the connections
            _group().end(exit_code, line)
            _group().leave()


def check_command(name: str | None) -> None:
    """Raise UsageError (exit 2) for a command that is one process's."""
    if are_several() and name not in _COMMANDS:
        some = ", ".join(_COMMANDS[:-1])
        raise UsageError(
            f"{name or 'grpo'}: is for one process; torchrun starts several of {some} or {_COMMANDS[-1]}"
        )


def joined(run: "ActiveRun", *, samples: bool = False) -> "ActiveRun":
    """The run, with the processes that train it together. samples: the command opens an engine too.

    Raises UsageError (exit 2) for what these cannot do yet.
    """
    if are_several():
        if (execution := run.config.execution) is not None and execution.processes > 1:
            raise UsageError(
                f"execution.learner.processes: {execution.processes}: torchrun has started processes already;"
                " leave one of the two out"
            )
        import_module("grpo.update.launch").refuse(run.config.update)
        if samples and _engine_of(run) == "vllm":
            raise UsageError(
                "generate.engine: vllm: has a process group of its own, beside which none can train yet; set"
                " engine: transformers, or start one process"
            )
        run.ranks = _group()
    return run


def _engine_of(run: "ActiveRun") -> str:
    choice = import_module("grpo.generate.engines.choice")
    engine: str = choice.choose_engine(run.config.generate.engine)[0]
    return engine


@cache
def _group() -> "Ranks":
    """Of this process; the first call waits for the others."""
    found: Ranks = import_module("grpo.update.launch").open_ranks()
    return found
