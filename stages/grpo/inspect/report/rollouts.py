"""rollouts: the rollouts of a run for the page: which of them fit, what each was and got, and its tokens."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.console import thinned
from grpo.errors import UsageError
from grpo.models.tokenizer import many_pieces, tokenizer_of

MAX_ROLLOUTS = 40_000
MAX_TOKENS = 3_000_000
"""Response tokens, and prompts at four bytes a token: about 10 MB of the page."""
_ALL_GROUPS = 2**31 - 1
_BY_TOKEN = ("tokens", "logprobs", "log_ratios")


class Limits(NamedTuple):
    """How much of a run goes into the page."""

    rollouts: int
    tokens: float


def limits(rollouts: int | None, num_runs: int) -> Limits:
    """For one of `num_runs` that share the page. `rollouts`, given by the user, lifts the limit on tokens.

    Raises UsageError (exit 2) for a negative number.
    """
    if rollouts is None:
        return Limits(MAX_ROLLOUTS // num_runs, MAX_TOKENS // num_runs)
    if rollouts < 0:
        raise UsageError(f"--rollouts {rollouts}: expected a number of rollouts, 0 or more")
    return Limits(rollouts // num_runs, math.inf)


@dataclass(frozen=True)
class Selection:
    """Iterations whose rollouts are in the page, and how many groups of each."""

    iterations: list[int]
    groups: int
    left_out: str = ""
    """What is not in the page, in words."""


def choose(sizes: list[dict[str, Any]], limit: Limits) -> Selection:
    """As many iterations as fit, evenly spaced, the first and the newest among them.

    `sizes`: iteration, groups, rollouts, tokens, in order. Where not even the newest fits, its first groups.
    """
    total = sum(row["rollouts"] for row in sizes)
    for count in range(len(sizes), 0, -1):
        picked = thinned(sizes, count) if count > 1 else sizes[-1:]
        rollouts, tokens = (sum(row[name] for row in picked) for name in ("rollouts", "tokens"))
        if rollouts <= limit.rollouts and tokens <= limit.tokens:
            text = f"all of {count} of {len(sizes)} iterations, evenly spaced"
            left_out = _left_out(rollouts, total, text) if count < len(sizes) else ""
            return Selection([row["iteration"] for row in picked], _ALL_GROUPS, left_out)
    if not sizes:
        return Selection([], 0)
    newest = sizes[-1]
    share = min(limit.rollouts / newest["rollouts"], limit.tokens / max(newest["tokens"], 1))
    groups = int(newest["groups"] * share)
    if not groups:
        return Selection([], 0, _left_out(0, total))
    text = f"the first {groups} groups of iteration {newest['iteration']}"
    rollouts = newest["rollouts"] * groups // newest["groups"]
    return Selection([newest["iteration"]], groups, _left_out(rollouts, total, text))


def _left_out(rollouts: int, total: int, which: str = "") -> str:
    return f"{rollouts:,} of {total:,} rollouts are in the file{which and ': '}{which}"


def read(connection: sql.Connection, run: ActiveRun, limit: Limits) -> tuple[dict[str, Any], str]:
    """The chosen rollouts of a run, and what was left out, in words.

    The lists of tokens and of their numbers (units: rollouts.sql) are beside the rollouts, one after the
    other, since like compresses best beside like. A token is a place in `texts`.
    """
    sizes = sql.rows(connection, "inspect/report/rollout_sizes", run=run.name)
    chosen = choose(sizes, limit)
    values = {"run": run.name, "iterations": chosen.iterations, "groups": chosen.groups}
    prompts = sql.rows(connection, "inspect/report/rollout_prompts", **values)
    found = sql.rows(connection, "inspect/report/rollouts", **values)
    document: dict[str, Any] = {
        "prompts": {row.pop("prompt_id"): row for row in prompts},
        "rollouts": found,
        "tokens_absent": "",
        **{name: [row.pop(name) for row in found] for name in _BY_TOKEN},
    }
    if (tokenizer := tokenizer_of(run)) is None:
        document |= dict.fromkeys(_BY_TOKEN)
        document["tokens_absent"] = "no tokenizer.json is where the checkpoints of this run were"
        return document, chosen.left_out
    for row in found:
        del row["response"]  # its tokens have the text
    texts, places, special = many_pieces(tokenizer, document["tokens"])
    return {**document, "tokens": places, "texts": texts, "special": special}, chosen.left_out
