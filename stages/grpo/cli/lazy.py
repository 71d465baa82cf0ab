"""lazy: what the commands call, imported when a command first uses it: `grpo --help` needs none of it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "artifacts",
    "compare",
    "config",
    "console",
    "doctor",
    "evaluations",
    "export",
    "fork",
    "gc",
    "init",
    "log",
    "prepare",
    "query",
    "report",
    "restart",
    "show",
    "status",
    "verify",
    "work",
]

if TYPE_CHECKING:
    from grpo import artifacts, config, console
    from grpo.inspect import compare, evaluations, log, query, report, show, status
    from grpo.manage import doctor, export, fork, gc, init, verify
    from grpo.pipeline import prepare, restart, work
else:

    class _Module:
        """Stands for a module: any access to it imports it."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(import_module(self._name), attribute)

    artifacts, config, console = (_Module(f"grpo.{name}") for name in ("artifacts", "config", "console"))
    compare, evaluations, log, query, report, show, status = (
        _Module(f"grpo.inspect.{name}")
        for name in ("compare", "evaluations", "log", "query", "report", "show", "status")
    )
    doctor, export, fork, gc, init, verify = (
        _Module(f"grpo.manage.{name}") for name in ("doctor", "export", "fork", "gc", "init", "verify")
    )
    prepare, restart, work = (_Module(f"grpo.pipeline.{name}") for name in ("prepare", "restart", "work"))
