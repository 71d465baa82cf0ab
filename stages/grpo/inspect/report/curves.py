"""curves: what runs look like by iteration: the charts of the page and of the picture."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from grpo import sql
from grpo.console import finite

SHARE = "share"
"""Unit of a number from 0 to 1, shown in per cent."""


@dataclass(frozen=True)
class Curve:
    """A chart. absent: why a run has none."""

    title: str
    unit: str
    meaning: str
    absent: str = "no update yet"
    section: str = "training"
    stacked: bool = False


_NO_ROLLOUTS, _UNSCORED = "no rollouts yet", "no advantages yet"
# iteration: the policy that was measured, the one that the iteration of that number samples from.
_held_out = partial(Curve, absent="no evaluation", section="evaluation")
# In the order of the page, by the name of their rows in curves.sql; each of `rewards` is a chart of its own.
CURVES = {
    "reward": Curve(
        "Reward", "", "Mean of the weighted sum of the rewards, over scored rollouts.", _UNSCORED
    ),
    "rewards": Curve(
        "Rewards by name", "", "Mean of this reward alone, without its weight.", "no rewards yet"
    ),
    "kl": Curve(
        "KL to the reference",
        "nats",
        "How far the policy has moved, per response token as the loss sees it.",
        "the loss has no KL term (update.kl_coefficient is 0)",
    ),
    "entropy": Curve(
        "Entropy", "nats", "Mean entropy per response token; near 0, sampling no longer explores."
    ),
    "response_tokens": Curve("Response length", "tokens", "Mean number of response tokens.", _NO_ROLLOUTS),
    "truncated": Curve("Truncated", SHARE, "Share of responses cut off at max_new_tokens.", _NO_ROLLOUTS),
    "clipped": Curve(
        "Clipped", SHARE, "Share of ratios that clipping holds, by side.", "no update yet, or none that clips"
    ),
    "mismatch_mean": Curve(
        "Mismatch", "nats", "Mean distance of sampler and learner per token, before any step; mind over 0.05."
    ),
    "groups_without_signal": Curve(
        "Groups without signal", SHARE, "Share of groups of equal rewards: their advantages are 0.", _UNSCORED
    ),
    "grad_norm": Curve("Gradient norm", "", "Before clipping at max_grad_norm; mean over the steps taken."),
    "seconds": Curve(
        "Seconds by stage", "s", "Where the time of an iteration goes.", "nothing was timed", stacked=True
    ),
    "eval_pass": _held_out(
        "Held-out pass@k", SHARE, "Chance that one of k responses to a held-out prompt passes; 95 % interval."
    ),
    "eval_reward": _held_out(
        "Held-out reward", "", "Mean over held-out prompts of the weighted sum of the rewards; 95 % interval."
    ),
    "eval_length": _held_out(
        "Held-out response length", "tokens", "Mean number of response tokens to held-out prompts."
    ),
}


def read(connection: sql.Connection, runs: list[str]) -> list[dict[str, Any]]:
    """Every chart with its series, those of the first of `runs` first; `absent` says why one has none.

    A series has run, name, x (iterations), y, and low and high, null where there is no interval.
    """
    rows = finite(sql.rows(connection, "inspect/report/curves", runs=runs))
    known = [{key: value for key, value in row.items() if value is not None} for row in rows]
    charts: list[dict[str, Any]] = []
    for name, curve in CURVES.items():
        empty = {**asdict(curve), "series": []}
        charts += [empty | row for row in known if row["curve"] == name] or [empty]
    return charts
