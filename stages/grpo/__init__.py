"""GRPO as a data pipeline: generate -> score -> advantage -> update, every stage a table on disk.

`grpo.open`, `grpo.run` and `grpo.stages` are the pipeline from Python (docs/python.md), imported when they
are first used: every command imports this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grpo.errors import (
    CorruptError,
    DataError,
    EngineError,
    GrpoError,
    InputError,
    Interrupted,
    LockedError,
    ResourceError,
    UsageError,
)

if TYPE_CHECKING:
    from grpo import stages
    from grpo.api import Run, open, run
    from grpo.inspect.rows import Rows

__version__ = "0.1.0"
__all__ = [
    "CorruptError",
    "DataError",
    "EngineError",
    "GrpoError",
    "InputError",
    "Interrupted",
    "LockedError",
    "ResourceError",
    "Rows",
    "Run",
    "UsageError",
    "open",
    "run",
    "stages",
]


def __getattr__(name: str) -> Any:
    if name == "stages":
        return import_module("grpo.stages")
    if name not in __all__:
        raise AttributeError(f"module 'grpo' has no attribute '{name}'")
    return getattr(import_module("grpo.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
