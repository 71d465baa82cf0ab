"""config.sweep: `--sweep key=v1,v2` -> a run for each value, or for each combination of several."""

import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from grpo.config.loading import load
from grpo.config.yaml import YamlError, parse
from grpo.errors import UsageError

_NAME = re.compile(r"[^A-Za-z0-9._]+")  # what a run's name has no room for


def points(path: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[list[str]]:
    """Overrides of each run: those given, then its values, then its name, RUN-learning_rate-1e-06.

    The last of the sweeps changes fastest. Raises UsageError (exit 2) for one that is none, and for two runs
    of one name.
    """
    base, axes = load(path, overrides).run, [_axis(sweep) for sweep in sweeps]
    found: dict[str, list[str]] = {}
    for point in product(*axes):
        parts = [f"{key.rpartition('.')[2]}-{_spelled(value)}" for key, value in point]
        name = "-".join([base, *(_NAME.sub("-", part).strip("-") for part in parts)])
        if name in found:
            raise UsageError(f"--sweep: two of its runs would be named {name}; leave one of the values out")
        values = [f"{key}={json.dumps(value)}" for key, value in point]
        found[name] = [*overrides, *values, f"run={name}"]
    return list(found.values())


def _axis(sweep: str) -> list[tuple[str, Any]]:
    key, _, text = sweep.partition("=")
    example = "expected key=v1,v2, such as --sweep update.learning_rate=1e-6,3e-6"
    try:
        values = parse(f"[{text}]") if text.strip() else []
    except YamlError as error:
        raise UsageError(f"--sweep {sweep}: {error}; {example}") from None
    if not key.strip() or not values:
        raise UsageError(f"--sweep {sweep}: {example}")
    if key.strip() == "run":
        raise UsageError("--sweep run: the names are made of the values; --set run=NAME is how they begin")
    return [(key.strip(), value) for value in values]


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
