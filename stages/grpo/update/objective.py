"""objective: the configured loss of one micro-batch, and the numbers of `updates` it adds to.

Shapes: N response tokens of the micro-batch, one rollout after another; B its rollouts; R is N or B, one
value per token or, for sequence ratios, per rollout.
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
from grpo.update.layout import MicroBatch
from grpo.update.loss import (
    Given,
    Objective,
    Step,
    aggregate_tokens,
    clipped,
    kl_loss,
    policy_loss,
    sampler_weights,
)

_MAX_KEYS_NAMED = 8
Logprobs = Mapping[int, np.ndarray]  # by row of Rollouts; float32, one per counted token


@dataclass
class Stored:
    """Log-probs of an iteration's kept rollouts. Whoever takes the steps keeps them; a step only reads."""

    policy: dict[int, np.ndarray] = field(default_factory=dict)
    """The learner's own when it first read the rollout: before its first step, where pi_old is recomputed."""
    reference: dict[int, np.ndarray] = field(default_factory=dict)
    first_step: dict[int, int] = field(default_factory=dict)

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
    largest: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        added = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}
        return Sums(**added | {"largest": max(self.largest, other.largest)})

    def row(self, objective: Objective) -> dict[str, Any]:
        """The columns of `updates`. Entropy and ratios are means over what was read."""
        kl = objective.kl_coefficient * self.kl
        return {
            "loss": self.policy_loss + kl - objective.entropy_coefficient * self.entropy_bonus,
            "policy_loss": self.policy_loss,
            "kl": self.kl if objective.kl_coefficient else None,
            "entropy": self.entropy / self.tokens,
            "ratio_mean": self.ratio / self.ratios,
            "ratio_max": self.largest,
            "clip_fraction_low": self.clipped_low / self.ratios,
            "clip_fraction_high": self.clipped_high / self.ratios,
        }


def objective_of(config: UpdateConfig) -> Objective:
    """The configured constants of the loss."""
    return Objective(**{each.name: getattr(config, each.name) for each in fields(Objective)})


def needed(config: UpdateConfig, rollouts: Rollouts) -> np.ndarray:
    """Which rollouts have a gradient, bool [B]: without KL and entropy term, an advantage of 0 has none.

    The others take no forward pass; they count in the denominators all the same.
    """
    if config.kl_coefficient or config.entropy_coefficient:
        return np.ones(len(rollouts), dtype=bool)
    return np.asarray(rollouts.advantages != 0)


def given_of(
    config: UpdateConfig, rollouts: Rollouts, batch: MicroBatch, stored: Stored, own: Logprobs
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
    weights_R = None
    if config.sampler_correction != "none":
        weights_R = sampler_weights(before_N, sampled_N, batch.lengths_B, objective_of(config))
    return Given(
        lengths_B=batch.lengths_B,
        advantages_B=torch.from_numpy(rollouts.advantages[batch.rows]).float().to(device),
        old_logprobs_N=sampled_N if config.old_logprobs == "sampled" else before_N,
        reference_logprobs_N=gather(reference, batch.rows, device) if reference else None,
        weights_R=weights_R,
    )


def batch_loss(
    logprobs_N: Tensor, entropy_N: Tensor, given: Given, objective: Objective, step: Step
) -> tuple[Tensor, Sums]:
    """This micro-batch's part of the step's loss (scalar), and of its numbers."""
    loss, ratio_R = policy_loss(logprobs_N, given, objective, step)
    advantages_R = given.by_ratio(given.advantages_B, objective.ratio)
    below_R, above_R = clipped(ratio_R, advantages_R, objective)
    part = Sums(
        policy_loss=loss.item(),
        entropy=entropy_N.detach().sum(dtype=torch.float64).item(),
        tokens=float(len(entropy_N)),
        ratio=ratio_R.sum(dtype=torch.float64).item(),
        ratios=float(len(ratio_R)),
        clipped_low=float(below_R.sum()),
        clipped_high=float(above_R.sum()),
        largest=ratio_R.max().item(),
    )
    if objective.kl_coefficient:
        kl = kl_loss(logprobs_N, given, objective, step)
        part.kl = kl.item()
        loss = loss + objective.kl_coefficient * kl
    if objective.entropy_coefficient:
        bonus = aggregate_tokens(entropy_N, given.lengths_B, objective.aggregate, step)
        part.entropy_bonus = bonus.item()
        loss = loss - objective.entropy_coefficient * bonus
    return loss, part


def name_keys(rollouts: Rollouts, rows: list[int]) -> str:
    """The keys of `rows` for an error, the first of them."""
    named = ", ".join(str(tuple(key)) for key in rollouts.keys[rows[:_MAX_KEYS_NAMED]].tolist())
    more = f" and {len(rows) - _MAX_KEYS_NAMED} more" if len(rows) > _MAX_KEYS_NAMED else ""
    return f"rollouts (iteration, group_id, sample_id) {named}{more}; nothing was committed"
