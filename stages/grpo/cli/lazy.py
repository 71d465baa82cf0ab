"""lazy: what the commands call, imported when a command first uses it: `grpo --help` needs none of it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "api",
    "artifacts",
    "check",
    "compare",
    "console",
    "doctor",
    "evaluations",
    "export",
    "fetch",
    "fork",
    "gc",
    "init",
    "opening",
    "query",
    "report",
    "restore",
    "settings",
    "shared",
    "show",
    "status",
    "verify",
    "verify_replay",
    "work",
]

if TYPE_CHECKING:
    from grpo import api, artifacts, console
    from grpo import config as settings
    from grpo.inspect import compare, evaluations, query, report, show, status
    from grpo.manage import doctor, export, fork, gc, init, verify, verify_replay
    from grpo.manage.doctor import shared
    from grpo.mirror import check, fetch, restore
    from grpo.pipeline import opening, work
else:

    class _Module:
        """Stands for a module: any access to it imports it."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(import_module(self._name), attribute)

    api, artifacts, console = (_Module(f"grpo.{name}") for name in ("api", "artifacts", "console"))
    settings = _Module("grpo.config")
    compare, evaluations, query, report, show, status = (
        _Module(f"grpo.inspect.{name}")
        for name in ("compare", "evaluations", "query", "report", "show", "status")
    )
    doctor, export, fork, gc, init, verify, verify_replay = (
        _Module(f"grpo.manage.{name}")
        for name in ("doctor", "export", "fork", "gc", "init", "verify", "verify_replay")
    )
    shared = _Module("grpo.manage.doctor.shared")
    check, fetch, restore = (_Module(f"grpo.mirror.{name}") for name in ("check", "fetch", "restore"))
    opening, work = (_Module(f"grpo.pipeline.{name}") for name in ("opening", "work"))
