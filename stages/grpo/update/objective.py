"""objective: the configured loss of one micro-batch, and the numbers of `updates` it adds to.

Shapes as in given.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.config import UpdateConfig
from grpo.errors import EngineError
from grpo.update.batch import Rollouts, gather
from grpo.update.given import Given, Objective, Step
from grpo.update.layout import MicroBatch
from grpo.update.loss import aggregate_tokens, clipped, kl_loss, off_policy, policy_loss, sampler_weights
from grpo.update.own_surrogate import OwnSurrogate

_MAX_KEYS_NAMED = 8
Logprobs = Mapping[int, np.ndarray]  # by row of Rollouts; float32, one per counted token


@dataclass
class Stored:
    """Log-probs of an iteration's kept rollouts. Whoever takes the steps keeps them; a step only reads."""

    policy: dict[int, np.ndarray] = field(default_factory=dict)
    """The learner's own when it first read the rollout: before its first step, where pi_old is recomputed."""
    reference: dict[int, np.ndarray] = field(default_factory=dict)
    entropy: dict[int, np.ndarray] = field(default_factory=dict)
    """Of the policy before its first step; only where update.top_entropy asks, and then of every rollout."""
    first_step: dict[int, int] = field(default_factory=dict)

    def of(self, rows: np.ndarray) -> "Stored":
        """What a step of `rows` reads of it."""
        names, asked = ("policy", "reference", "entropy"), rows.tolist()
        held = {name: getattr(self, name) for name in names}
        return Stored(
            **{name: {row: each[row] for row in asked if row in each} for name, each in held.items()}
        )

    def keep(self, logprobs: Logprobs, step: int) -> None:
        """Add the policy's log-probs of the rows that a step read; those of a row that is known stay."""
        for row in logprobs.keys() - self.first_step.keys():
            self.policy.setdefault(row, logprobs[row])
            self.first_step[row] = step


@dataclass
class Sums:
    """Parts of a step's numbers, added up over micro-batches and processes; `largest` is a maximum."""

    policy_loss: float = 0.0
    kl: float = 0.0
    entropy_bonus: float = 0.0
    entropy: float = 0.0
    tokens: float = 0.0
    ratio: float = 0.0
    ratios: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    clips: float = 0.0
    low_entropy: float = 0.0
    rollouts: float = 0.0
    off_policy: float = 0.0
    largest: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        added = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}
        return Sums(**added | {"largest": max(self.largest, other.largest)})

    def row(self, objective: Objective) -> dict[str, Any]:
        """The columns of `updates`. Entropy, ratios and shares are over what was read."""
        kl, clips = objective.kl_coefficient * self.kl, self.clips or None
        off, top = objective.off_policy_mask, objective.top_entropy
        return {
            "loss": self.policy_loss + kl - objective.entropy_coefficient * self.entropy_bonus,
            "policy_loss": self.policy_loss,
            "kl": self.kl if objective.kl_coefficient else None,
            "entropy": self.entropy / self.tokens,
            "ratio_mean": self.ratio / self.ratios,
            "ratio_max": self.largest,
            "clip_fraction_low": clips and self.clipped_low / clips,
            "clip_fraction_high": clips and self.clipped_high / clips,
            "off_policy_fraction": None if off is None else self.off_policy / self.rollouts,
            "low_entropy_fraction": None if top is None else self.low_entropy / self.tokens,
        }


def objective_of(config: UpdateConfig, own: OwnSurrogate | None = None) -> Objective:
    """The configured constants of the loss. own: what update.surrogate names, where that is the user's."""
    names = [each.name for each in fields(Objective) if each.name != "own"]
    return Objective(**{name: getattr(config, name) for name in names}, own=own)


def step_of(
    config: UpdateConfig, rollouts: Rollouts, rows: np.ndarray, max_new_tokens: int, stored: Stored
) -> Step:
    """What the optimiser step of `rows` has over all its micro-batches.

    The entropy bound is that of all its tokens, so that how the step is cut changes nothing.
    """
    bound = None
    if config.top_entropy is not None:
        entropies = np.concatenate([stored.entropy[row] for row in rows.tolist()]).astype(np.float64)
        bound = float(np.quantile(entropies, 1 - config.top_entropy))
    groups = len(np.unique(rollouts.keys[rows, :2], axis=0))
    return Step(len(rows), int(rollouts.num_tokens[rows].sum()), max_new_tokens, groups, bound)


def needed(config: UpdateConfig, rollouts: Rollouts) -> np.ndarray:
    """Which rollouts have a gradient, bool [B]: without KL and entropy term, an advantage of 0 has none.

    All of them under the user's own surrogate, which may have terms without the advantage. The others take no
    forward pass; they count in the denominators all the same.
    """
    if config.kl_coefficient or config.has_entropy_term or config.own is not None:
        return np.ones(len(rollouts), dtype=bool)
    if rollouts.token_advantages is None:
        return np.asarray(rollouts.advantages != 0)
    return np.array([bool(each_N.any()) for each_N in rollouts.token_advantages], dtype=bool)


def given_of(
    config: UpdateConfig,
    objective: Objective,
    step: Step,
    rollouts: Rollouts,
    batch: MicroBatch,
    stored: Stored,
    own: Logprobs,
) -> Given:
    """What the loss of a micro-batch is computed from, on its device. own: the policy's log-probs as it is.

    pi_old: what the sampler stored, or (recomputed) the learner's own before its first step, which with one
    step are `own`. Raises EngineError (exit 8) naming the rollouts with a log-prob that is not finite.
    """
    before = {row: stored.policy.get(row, values) for row, values in own.items()}
    sampled = {row: rollouts.old_logprobs[row] for row in own}
    reference = {row: stored.reference[row] for row in own} if config.kl_coefficient else {}
    for name, values in (("policy", own), ("old", sampled), ("reference", reference)):
        if broken := [row for row in values if not np.isfinite(values[row]).all()]:  # clipping would hide it
            raise EngineError(f"update: {name}_logprobs are not finite on {name_keys(rollouts, broken)}")
    device = str(batch.lengths_B.device)
    before_N, sampled_N = (gather(each, batch.rows, device) for each in (before, sampled))
    weights_V = low_entropy_N = None
    if config.sampler_correction != "none":
        weights_V = sampler_weights(before_N, sampled_N, batch.lengths_B, objective)
    if step.entropy_bound is not None:
        low_N = np.concatenate([stored.entropy[row] < step.entropy_bound for row in batch.rows.tolist()])
        low_entropy_N = torch.from_numpy(low_N).to(device)
    return Given(
        lengths_B=batch.lengths_B,
        advantages_N=torch.from_numpy(rollouts.advantages_by_token(batch.rows)).float().to(device),
        old_logprobs_N=sampled_N if config.old_logprobs == "sampled" else before_N,
        reference_logprobs_N=gather(reference, batch.rows, device) if reference else None,
        weights_V=weights_V,
        group_tokens_B=torch.from_numpy(rollouts.group_tokens[batch.rows]).to(device),
        sampled_logprobs_N=sampled_N,
        low_entropy_N=low_entropy_N,
    )


def batch_loss(
    logprobs_N: Tensor, entropy_N: Tensor, given: Given, objective: Objective, step: Step
) -> tuple[Tensor, Sums]:
    """This micro-batch's part of the step's loss (scalar), and of its numbers."""
    loss, ratio_R = policy_loss(logprobs_N, given, objective, step)
    part = Sums(
        policy_loss=loss.item(),
        entropy=entropy_N.detach().sum(dtype=torch.float64).item(),
        tokens=float(len(entropy_N)),
        ratio=ratio_R.sum(dtype=torch.float64).item(),
        ratios=float(len(ratio_R)),
        rollouts=float(len(given.lengths_B)),
        largest=ratio_R.max().item(),
    )
    if sides := clipped(ratio_R, logprobs_N, given, objective):
        part.clipped_low, part.clipped_high = (float(side.sum()) for side in sides)
        part.clips = float(len(sides[0]))
    if given.low_entropy_N is not None:
        part.low_entropy = float(given.low_entropy_N.sum())
    if objective.off_policy_mask is not None:
        negative_B = given.sums((given.advantages_N < 0).float()) > 0
        part.off_policy = float((off_policy(logprobs_N, given, objective) & negative_B).sum())
    if objective.kl_coefficient:
        kl = kl_loss(logprobs_N, given, objective, step)
        part.kl = kl.item()
        loss = loss + objective.kl_coefficient * kl
    if objective.entropy_coefficient:
        bonus = aggregate_tokens(entropy_N, given, objective.aggregate, step)
        part.entropy_bonus = bonus.item()
        loss = loss - objective.entropy_coefficient * bonus
    return loss, part


def name_keys(rollouts: Rollouts, rows: list[int]) -> str:
    """The keys of `rows` for an error, the first of them."""
    named = ", ".join(str(tuple(key)) for key in rollouts.keys[rows[:_MAX_KEYS_NAMED]].tolist())
    more = f" and {len(rows) - _MAX_KEYS_NAMED} more" if len(rows) > _MAX_KEYS_NAMED else ""
    return f"rollouts (iteration, group_id, sample_id) {named}{more}; nothing was committed"
