"""selection: which rollouts go into the page when not all of them fit: whole iterations, evenly spaced."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo.errors import UsageError

MAX_ROLLOUTS = 40_000
MAX_TOKENS = 3_000_000
"""Response tokens, and prompts at four bytes a token: about 10 MB of the page."""


@dataclass(frozen=True)
class Limits:
    """How much of a run goes into the page. `rollouts` given by the user lifts the limit on tokens."""

    rollouts: int = MAX_ROLLOUTS
    tokens: int | None = MAX_TOKENS

    def shared_by(self, num_runs: int) -> "Limits":
        """The same, for one of `num_runs` that share the page."""
        return Limits(self.rollouts // num_runs, None if self.tokens is None else self.tokens // num_runs)


def limits(rollouts: int | None) -> Limits:
    """The default limits, or `rollouts` in all. Raises UsageError (exit 2) for a negative number."""
    if rollouts is None:
        return Limits()
    if rollouts < 0:
        raise UsageError(f"--rollouts {rollouts}: expected a number of rollouts, 0 or more")
    return Limits(rollouts, None)


@dataclass(frozen=True)
class Selection:
    """Iterations whose rollouts are in the page, and how many groups of each (None: all)."""

    iterations: list[int]
    groups: int | None
    rollouts: int
    of_rollouts: int
    of_iterations: int

    def left_out(self) -> str:
        """What is not in the page, in words; empty when nothing is."""
        if self.rollouts == self.of_rollouts:
            return ""
        start = f"{self.rollouts:,} of {self.of_rollouts:,} rollouts are in the file"
        if not self.iterations:
            return start
        if self.groups is not None:
            return f"{start}: the first {self.groups} groups of iteration {self.iterations[0]}"
        return f"{start}: all of {len(self.iterations)} of {self.of_iterations} iterations, evenly spaced"


def choose(sizes: list[dict[str, Any]], limit: Limits) -> Selection:
    """As many iterations as fit, evenly spaced, the first and the newest among them.

    `sizes`: iteration, groups, rollouts, tokens, in order. Where not even the newest fits, its first groups.
    """
    total = sum(row["rollouts"] for row in sizes)
    for count in range(len(sizes), 0, -1):
        places = np.linspace(0 if count > 1 else len(sizes) - 1, len(sizes) - 1, count).round().astype(int)
        picked = [sizes[place] for place in places]
        if _fits(picked, limit):
            rollouts = sum(row["rollouts"] for row in picked)
            return Selection([row["iteration"] for row in picked], None, rollouts, total, len(sizes))
    if not sizes or limit.rollouts == 0:
        return Selection([], None, 0, total, len(sizes))
    newest = sizes[-1]
    share = limit.rollouts / newest["rollouts"]
    if limit.tokens is not None and newest["tokens"]:
        share = min(share, limit.tokens / newest["tokens"])
    groups = int(newest["groups"] * share)
    rollouts = newest["rollouts"] * groups // newest["groups"]
    return Selection([newest["iteration"]] if groups else [], groups, rollouts, total, len(sizes))


def _fits(picked: list[dict[str, Any]], limit: Limits) -> bool:
    rollouts, tokens = (sum(row[name] for row in picked) for name in ("rollouts", "tokens"))
    return rollouts <= limit.rollouts and (limit.tokens is None or tokens <= limit.tokens)
