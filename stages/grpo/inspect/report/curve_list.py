"""curve_list: every curve of the report, in the order of the page; their numbers are in curves.sql."""

from dataclasses import dataclass

SHARE = "share"
"""Unit of a number from 0 to 1, shown in per cent."""


@dataclass(frozen=True)
class Curve:
    """A chart; the page, the picture and docs/report.md have them from here."""

    name: str
    """Its rows of curves.sql."""
    title: str
    unit: str
    meaning: str
    absent: str
    """Why a run has no such curve."""
    section: str = "training"
    split: bool = False
    """Each series is a chart of its own, titled by the series."""
    stacked: bool = False


CURVES = (
    Curve(
        "reward",
        "Reward",
        "",
        "Mean of the weighted sum of the rewards, over scored rollouts.",
        "no advantages yet",
    ),
    Curve(
        "rewards",
        "Rewards by name",
        "",
        "Mean of this reward alone, without its weight.",
        "no rewards yet",
        split=True,
    ),
    Curve(
        "kl",
        "KL to the reference",
        "nats",
        "How far the policy has moved, per response token as the loss sees it.",
        "the loss has no KL term (update.kl_coefficient is 0)",
    ),
    Curve(
        "entropy",
        "Entropy",
        "nats",
        "Mean entropy per response token; near 0, sampling no longer explores.",
        "no update yet",
    ),
    Curve(
        "response_tokens", "Response length", "tokens", "Mean number of response tokens.", "no rollouts yet"
    ),
    Curve(
        "truncated", "Truncated", SHARE, "Share of responses cut off at max_new_tokens.", "no rollouts yet"
    ),
    Curve(
        "clipped",
        "Clipped",
        SHARE,
        "Share of ratios beyond the clip range on the side where clipping stops the gradient.",
        "no update yet, or none that clips",
    ),
    Curve(
        "mismatch_mean",
        "Mismatch",
        "nats",
        "Mean distance of sampler and learner per token, before any step; above 0.05 mind it.",
        "no update yet",
    ),
    Curve(
        "groups_without_signal",
        "Groups without signal",
        SHARE,
        "Share of groups whose rewards are all equal: their advantages are 0.",
        "no advantages yet",
    ),
    Curve(
        "grad_norm",
        "Gradient norm",
        "",
        "Before clipping at max_grad_norm; mean over the steps taken.",
        "no update yet",
    ),
    Curve(
        "seconds",
        "Seconds by stage",
        "s",
        "Where the time of an iteration goes.",
        "nothing was timed",
        stacked=True,
    ),
    # iteration: the policy that was measured, the one that the iteration of that number samples from.
    Curve(
        "eval_pass",
        "Held-out pass@k",
        SHARE,
        "Chance that one of k responses to a held-out prompt passes; 95 % interval over prompts.",
        "no evaluation",
        section="evaluation",
    ),
    Curve(
        "eval_reward",
        "Held-out reward",
        "",
        "Mean over held-out prompts of the weighted sum of the rewards; 95 % interval.",
        "no evaluation",
        section="evaluation",
    ),
    Curve(
        "eval_length",
        "Held-out response length",
        "tokens",
        "Mean number of response tokens to held-out prompts.",
        "no evaluation",
        section="evaluation",
    ),
)
