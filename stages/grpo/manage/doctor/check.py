"""check: one line of `grpo doctor`."""

from dataclasses import dataclass
from typing import Literal

from grpo.errors import GrpoError


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Example: Check("disk", "59.2 GiB free", "1.2 GiB for 60 iterations").
    """

    name: str
    found: str
    needed: str = ""
    level: Literal["ok", "warning", "failed"] = "ok"
    note: str = ""
    """What would be right, where the level is not ok; else what is left out."""
    exit_code: int = 0
    """What a run would exit with; 0 unless failed."""


def failed(name: str, found: str, needed: str, error: GrpoError) -> Check:
    """A check that ends a run with `error`, whose message says what would be right."""
    return Check(name, found, needed, "failed", str(error), error.exit_code)


def gib(num_bytes: float) -> str:
    """A size for a person: `7.4 GiB`, `12 MiB`."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.0f} MiB"
