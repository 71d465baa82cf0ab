"""artifacts.existing: runs that exist, by name, and what they were created with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.artifacts.manifest import read_sealed
from grpo.config import Config, validated
from grpo.errors import InputError, UsageError

ARTIFACTS = Path("artifacts")


def open_run(name: str, root: Path = ARTIFACTS) -> dict[str, Any]:
    """What `run.json` of an existing run holds; errors as require_run's, CorruptError where it changed."""
    path = require_run(name, root)
    return read_sealed(path)


def created_config(name: str, root: Path = ARTIFACTS, overrides: Sequence[str] = ()) -> Config:
    """The configuration that an existing run was created with, and `overrides`; errors as open_run's.

    Raises InputError (exit 4) where it is not one of this version of grpo.
    """
    data = open_run(name, root).get("config")
    try:
        return validated(data, root / name / "run.json", overrides)
    except UsageError as error:
        if overrides:
            raise
        raise InputError(f"{error}; another version of grpo made this run") from None


def require_run(name: str, root: Path = ARTIFACTS) -> Path:
    """The `run.json` of an existing run. Raises UsageError (exit 2) naming the runs that are there."""
    path = root / name / "run.json"
    if Path(name).name != name or not path.exists():
        known = run_names(root)
        there = f"runs there: {', '.join(known)}" if known else "no run is there yet; `grpo run` makes one"
        raise UsageError(f"{root / name}: no such run; {there}")
    return path


def run_names(root: Path = ARTIFACTS) -> list[str]:
    """Names of the runs that are there."""
    found = (path.parent.name for path in root.glob("*/run.json"))
    return sorted(name for name in found if not name.startswith("."))  # a dot: a fork that was killed
