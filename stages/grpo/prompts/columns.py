"""columns: a value of a row by the name of its column, or by its path into structs and lists."""

import datetime
import decimal
import math
import re
from collections.abc import Iterator
from typing import Any

ABSENT = object()
"""What find() gives where there is no such column or field."""
MAX_CHARACTERS = 2**24  # of a prompt: ten times the longest context there is
_EXACT = 2**53  # above, not every whole number is a float


def find(value: Any, path: str) -> Any:
    """The value at `answer`, `reward_model.ground_truth` or `extra_info.answers[0]`; ABSENT: there is none.

    A column, or field, of the longest name comes first, so one that has a dot in its name is found. None
    where something on the way is null or a list is too short.
    """
    if not path or value is None:
        return value
    if isinstance(value, list) and (match := re.match(r"\[([0-9]+)\]\.?", path)):
        place = int(match[1])
        return find(value[place], path[match.end() :]) if place < len(value) else None
    if not isinstance(value, dict):
        return ABSENT
    for end in [len(path), *(at.start() for at in reversed(list(re.finditer(r"[.\[]", path))))]:
        if path[:end] in value:
            return find(value[path[:end]], path[end:].removeprefix("."))
    return ABSENT


def paths(row: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The names by which find() finds what is in a row: columns, and the fields of structs."""
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def text_of(value: Any) -> str | None:
    """A reference answer as text, the same from every format: 3 and 3.0 are `3`, NaN is missing.

    Raises ValueError for what is neither text nor a number, date or truth value.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        if math.isnan(value):  # how NumPy, and so pandas, writes a missing number
            return None
        if not math.isfinite(value):
            raise ValueError(f"must be text or a number, found {value}")
        return str(int(value)) if value.is_integer() and abs(value) < _EXACT else str(value)
    if isinstance(value, decimal.Decimal):
        shown = f"{value:f}"
        return shown.rstrip("0").rstrip(".") if "." in shown else shown
    if isinstance(value, int | datetime.date | datetime.time):
        return str(value)
    raise ValueError(f"must be text or a number, found {type(value).__name__}")
