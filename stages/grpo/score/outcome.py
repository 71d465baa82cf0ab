"""outcome: what scoring one rollout gave. Imports nothing heavy: workers and the reward model both use it."""

import math
import unicodedata
from typing import NamedTuple

MAX_ERROR_CHARACTERS = 500  # an error is a table cell and a terminal line, not a log

_COUNTED = "(on_timeout): "

Key = tuple[int, int]
"""(group_id, sample_id): unique within an iteration."""


class Outcome(NamedTuple):
    """The reward of one rollout, or why there is none.

    value: finite when status is `ok`, else None. status: `ok`; `error` (raised, crashed, or gave something
    that is no number); `timeout`; `nonfinite` (NaN or infinite); `not_applicable` (the function gave None).
    error: one line of at most 500 characters; None for `not_applicable`, and for `ok` but of a time-out that
    counts as a number.
    """

    value: float | None
    status: str
    error: str | None = None


def outcome_of(value: float, who: str) -> Outcome:
    """The outcome of a number; who: gave it, as an error begins."""
    return Outcome(value, "ok") if math.isfinite(value) else Outcome(None, "nonfinite", f"{who} {value}")


def counted(outcome: Outcome, on_timeout: float | str) -> Outcome:
    """A time-out as the number that it counts, with its reason; any other outcome as it is."""
    if outcome.status != "timeout" or isinstance(on_timeout, str):
        return outcome
    return Outcome(on_timeout, "ok", one_line(f"counts {on_timeout:g} {_COUNTED}{outcome.error}"))


def uncounted(outcome: Outcome) -> Outcome:
    """The reverse: what became of the rollout, whatever a time-out counted then."""
    if outcome.status != "ok" or outcome.error is None:
        return outcome
    return Outcome(None, "timeout", outcome.error.partition(_COUNTED)[2])


def one_line(text: str) -> str:
    """The text without control, format and line-break characters, cut to 500 characters.

    Error texts quote what a model wrote; an escape sequence in them must not reach a terminal.
    """
    text = text[: 20 * MAX_ERROR_CHARACTERS]  # of megabytes, the rest would be dropped below
    # Category C: control, format (bidirectional overrides too), surrogates. Z: every kind of space and break.
    spaced = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    line = " ".join(spaced.split())
    return line if len(line) <= MAX_ERROR_CHARACTERS else line[: MAX_ERROR_CHARACTERS - 3] + "..."
