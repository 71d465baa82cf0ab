"""objective: the configured loss of one micro-batch, and the numbers of `updates` it adds to.

Shapes: N response tokens of the micro-batch, one rollout after another; B its rollouts; R is N or B, one
value per token or, for sequence ratios, per rollout.
"""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.config import UpdateConfig
from grpo.errors import EngineError
from grpo.update.batch import Rollouts, Rows, gather
from grpo.update.layout import MicroBatch
from grpo.update.loss import Step, aggregate_tokens, clipped, kl_loss, policy_loss, sampler_weights

_MAX_KEYS_NAMED = 8


@dataclass
class Stored:
    """Log-probs of an iteration's kept rollouts, by row of Rollouts; float32, one per counted token."""

    policy: MutableMapping[int, np.ndarray] = field(default_factory=dict)
    """The learner's own when it first read the rollout: before its first step, where pi_old is recomputed."""
    reference: MutableMapping[int, np.ndarray] = field(default_factory=dict)
    first_step: dict[int, int] = field(default_factory=dict)


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

    def add(self, other: "Sums") -> None:
        """Add the part of another micro-batch."""
        largest = max(self.largest, other.largest)
        for name in (each.name for each in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = largest

    def row(self, config: UpdateConfig) -> dict[str, Any]:
        """The columns of `updates`. Entropy and ratios are means over what was read."""
        kl = config.kl_coefficient * self.kl
        return {
            "loss": self.policy_loss + kl - config.entropy_coefficient * self.entropy_bonus,
            "policy_loss": self.policy_loss,
            "kl": self.kl if config.kl_coefficient else None,
            "entropy": self.entropy / self.tokens,
            "ratio_mean": self.ratio / self.ratios,
            "ratio_max": self.largest,
            "clip_fraction_low": self.clipped_low / self.ratios,
            "clip_fraction_high": self.clipped_high / self.ratios,
        }


def objective(
    config: UpdateConfig,
    rollouts: Rollouts,
    batch: MicroBatch,
    stored: Stored,
    step: Step,
    logprobs_N: Tensor,
    entropy_N: Tensor,
) -> tuple[Tensor, Sums]:
    """This micro-batch's part of the step's loss (scalar), and of its numbers.

    Raises EngineError (exit 8) naming the rollouts when the loss is not finite.
    """
    device = str(logprobs_N.device)
    old_N = gather(_pi_old(config, rollouts, stored), batch.rows, device)
    advantages_B = torch.from_numpy(rollouts.advantages[batch.rows]).float().to(device)
    loss, ratio_R = policy_loss(
        logprobs_N,
        old_N,
        advantages_B,
        batch.lengths_B,
        ratio=config.ratio,
        surrogate=config.surrogate,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        delta=config.delta,
        aggregate=config.aggregate,
        step=step,
        weights_R=_sampler_weights(config, rollouts, batch, stored, device),
    )
    part = _sums(config, loss, ratio_R, advantages_B, batch.lengths_B, entropy_N)
    if config.kl_coefficient:
        reference_N = gather(stored.reference, batch.rows, device)
        kl = kl_loss(
            logprobs_N,
            reference_N,
            old_N,
            batch.lengths_B,
            estimator=config.kl_estimator,
            importance=config.kl_importance,
            ratio=config.ratio,
            aggregate=config.aggregate,
            step=step,
        )
        part.kl = kl.item()
        loss = loss + config.kl_coefficient * kl
    if config.entropy_coefficient:
        bonus = aggregate_tokens(entropy_N, batch.lengths_B, config.aggregate, step)
        part.entropy_bonus = bonus.item()
        loss = loss - config.entropy_coefficient * bonus
    if not math.isfinite(loss.item()):
        raise EngineError(f"update: the loss is {loss.item()} on {name_keys(rollouts, list(batch.rows))}")
    return loss, part


def _sums(
    config: UpdateConfig,
    loss: Tensor,
    ratio_R: Tensor,
    advantages_B: Tensor,
    lengths_B: Tensor,
    entropy_N: Tensor,
) -> Sums:
    per_token = config.ratio == "token"
    advantages_R = torch.repeat_interleave(advantages_B, lengths_B) if per_token else advantages_B
    low, high = clipped(
        ratio_R, advantages_R, config.clip_low, config.clip_high, config.surrogate, config.delta
    )
    return Sums(
        policy_loss=loss.item(),
        entropy=entropy_N.detach().sum(dtype=torch.float64).item(),
        tokens=float(len(entropy_N)),
        ratio=ratio_R.sum(dtype=torch.float64).item(),
        ratios=float(len(ratio_R)),
        clipped_low=float(low),
        clipped_high=float(high),
        largest=ratio_R.max().item(),
    )


def needed(config: UpdateConfig, rollouts: Rollouts, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` that have a gradient: without KL and entropy term, an advantage of 0 has none.

    The others take no forward pass; they count in the denominators all the same.
    """
    if config.kl_coefficient or config.entropy_coefficient:
        return rows
    signal: np.ndarray = rows[rollouts.advantages[rows] != 0]
    return signal


def check_finite(rollouts: Rollouts, own: dict[int, np.ndarray], stored: Stored) -> None:
    """Raise EngineError naming rollouts with a log-prob that is not finite: clipping would hide it."""
    old = {row: rollouts.old_logprobs[row] for row in own}
    reference = {row: stored.reference[row] for row in own if row in stored.reference}
    for name, values in (("policy", own), ("old", old), ("reference", reference)):
        if broken := [row for row in values if not np.isfinite(values[row]).all()]:
            raise EngineError(f"update: {name}_logprobs are not finite on {name_keys(rollouts, broken)}")


def name_keys(rollouts: Rollouts, rows: list[int]) -> str:
    """The keys of `rows` for an error, the first of them."""
    keys = [tuple(int(part) for part in rollouts.keys[row]) for row in rows[:_MAX_KEYS_NAMED]]
    more = f" and {len(rows) - len(keys)} more" if len(rows) > len(keys) else ""
    return (
        f"rollouts (iteration, group_id, sample_id) {', '.join(map(str, keys))}{more}; nothing was committed"
    )


def _pi_old(
    config: UpdateConfig, rollouts: Rollouts, stored: Stored
) -> Rows | MutableMapping[int, np.ndarray]:
    """What the sampler stored, or the learner's own before its first step."""
    return rollouts.old_logprobs if config.old_logprobs == "sampled" else stored.policy


def _sampler_weights(
    config: UpdateConfig, rollouts: Rollouts, batch: MicroBatch, stored: Stored, device: str
) -> Tensor | None:
    """Weight of each surrogate value of the batch, [R]; None without a correction."""
    if config.sampler_correction == "none":
        return None
    return sampler_weights(
        gather(stored.policy, batch.rows, device),
        gather(rollouts.old_logprobs, batch.rows, device),
        batch.lengths_B,
        ratio=config.ratio,
        correction=config.sampler_correction,
        level=config.sampler_correction_level,
        cap=config.sampler_correction_cap,
    )
