"""rollouts: the rollouts of a run for the page: which of them fit, what each was and got, and its tokens."""

import math
from dataclasses import dataclass
from typing import Any

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


def limits(rollouts: int | None, num_runs: int) -> tuple[int, float]:
    """How many rollouts and tokens one of `num_runs` that share the page may have; `rollouts`: by the user.

    Raises UsageError (exit 2) for a negative number.
    """
    if rollouts is None:
        return MAX_ROLLOUTS // num_runs, MAX_TOKENS // num_runs
    if rollouts < 0:
        raise UsageError(f"--rollouts {rollouts}: expected a number of rollouts, 0 or more")
    return rollouts // num_runs, math.inf  # whatever their length


@dataclass(frozen=True)
class Selection:
    """Iterations whose rollouts are in the page, and how many groups of each."""

    iterations: list[int]
    groups: int
    left_out: str = ""
    """What is not in the page, in words."""


def choose(sizes: list[dict[str, Any]], max_rollouts: int, max_tokens: float) -> Selection:
    """As many iterations as fit, evenly spaced, the first and the newest among them.

    `sizes`: iteration, groups, rollouts, tokens, in order. Where not even the newest fits, its first groups.
    """
    total = sum(row["rollouts"] for row in sizes)
    for count in range(len(sizes), 0, -1):
        picked = thinned(sizes, count) if count > 1 else sizes[-1:]
        rollouts, tokens = (sum(row[name] for row in picked) for name in ("rollouts", "tokens"))
        if rollouts <= max_rollouts and tokens <= max_tokens:
            spaced = f"{_held(rollouts, total)}: all of {count} of {len(sizes)} iterations, evenly spaced"
            iterations = [row["iteration"] for row in picked]
            return Selection(iterations, _ALL_GROUPS, spaced if count < len(sizes) else "")
    if not sizes:
        return Selection([], 0)
    newest = sizes[-1]
    share = min(max_rollouts / newest["rollouts"], max_tokens / max(newest["tokens"], 1))
    groups = int(newest["groups"] * share)
    if not groups:
        return Selection([], 0, _held(0, total))
    held = _held(newest["rollouts"] * groups // newest["groups"], total)
    left_out = f"{held}: the first {groups} groups of iteration {newest['iteration']}"
    return Selection([newest["iteration"]], groups, left_out)


def _held(rollouts: int, total: int) -> str:
    return f"{rollouts:,} of {total:,} rollouts are in the file"


def read(
    connection: sql.Connection, run: ActiveRun, max_rollouts: int, max_tokens: float
) -> tuple[dict[str, Any], str]:
    """The chosen rollouts of a run, and what was left out, in words.

    The lists of tokens and of their numbers (units: rollouts.sql) are beside the rollouts, one after the
    other, since like compresses best beside like. A token is a place in `texts`.
    """
    sizes = sql.rows(connection, "inspect/report/rollout_sizes", run=run.name)
    chosen = choose(sizes, max_rollouts, max_tokens)
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
