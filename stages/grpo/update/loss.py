"""loss: the objective of docs/math.md. Pure functions: tensors in, tensors out.

Shapes: N response tokens of a micro-batch, one rollout after another; B its rollouts; lengths_B tokens of
each, so sum(lengths_B) = N. R is N or B: one value per token, or one per rollout for sequence ratios.

Every denominator is that of the whole optimiser step, so the sum over micro-batches does not depend on how
the step is cut. GRPO alone, in 30 lines, is in docs/math.md; a test runs it against this.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# e^20 = 4.9e8: beyond it an importance ratio says only that the policies have nothing in common. Below it
# exp() is finite in float32 and so is its gradient; without the bound min() would multiply inf by 0.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Objective:
    """The constants of a loss, named as in pipeline.yaml. Without arguments: GRPO with no KL term."""

    ratio: str = "token"
    surrogate: str = "clip"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    delta: float | None = None
    aggregate: str = "sequence_mean"
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    kl_importance: bool = False
    entropy_coefficient: float = 0.0
    sampler_correction: str = "none"
    sampler_correction_level: str = "token"
    sampler_correction_cap: float = 2.0

    @property
    def bounds(self) -> tuple[float, float]:
        """What the ratio is clipped to; infinite on a side that is not clipped."""
        low = -math.inf if self.clip_low is None else 1 - self.clip_low
        return low, math.inf if self.clip_high is None else 1 + self.clip_high

    @property
    def cap(self) -> float:
        """The largest ratio for advantages of either sign; infinite without delta."""
        return math.inf if self.delta is None else self.delta


@dataclass(frozen=True)
class Step:
    """Denominators of one optimiser step over all its micro-batches."""

    num_rollouts: int  # kept ones, which docs/math.md calls N
    num_tokens: int  # the sum of T_i
    max_new_tokens: int  # what the rollouts were sampled with


@dataclass(frozen=True)
class Given:
    """What a micro-batch has beside the policy's log-probs, all of it constant."""

    lengths_B: Tensor
    advantages_B: Tensor
    old_logprobs_N: Tensor
    reference_logprobs_N: Tensor | None = None  # without a KL term
    weights_R: Tensor | None = None  # sampler_weights(), or no correction

    def by_ratio(self, values_B: Tensor, ratio: str) -> Tensor:
        """One value per rollout as one per ratio, [R]."""
        return torch.repeat_interleave(values_B, self.lengths_B) if ratio == "token" else values_B


def rollout_sums(values_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Sum over the tokens of each rollout, [B]."""
    return torch.segment_reduce(values_N, "sum", lengths=lengths_B, axis=0, initial=0.0)


def log_ratio(logprobs_N: Tensor, old_logprobs_N: Tensor, lengths_B: Tensor, ratio: str) -> Tensor:
    """log rho, [N] for `token`, [B] for `sequence` and `sequence_mean` (GSPO), bounded by MAX_LOG_RATIO."""
    d_N = logprobs_N - old_logprobs_N
    log_ratio_R = d_N if ratio == "token" else rollout_sums(d_N, lengths_B)
    if ratio == "sequence_mean":
        log_ratio_R = log_ratio_R / lengths_B
    else:
        assert ratio in ("token", "sequence"), ratio
    return log_ratio_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def sampler_weights(
    policy_logprobs_N: Tensor, sampled_logprobs_N: Tensor, lengths_B: Tensor, objective: Objective
) -> Tensor:
    """Detached weight of each surrogate value, [R]: w = exp(policy - sampled), by token or rollout mean.

    policy_logprobs_N: the learner's before its first step of the iteration; sampled_logprobs_N: the
    sampler's. `truncate`: min(w, cap) (truncated importance sampling). `mask`: 0 outside [1 / cap, cap].
    """
    level, cap = objective.sampler_correction_level, objective.sampler_correction_cap
    per_token = objective.ratio == "token"
    assert per_token or level == "sequence_mean", (objective.ratio, level)
    w_R = torch.exp(log_ratio(policy_logprobs_N.detach(), sampled_logprobs_N.detach(), lengths_B, level))
    if objective.sampler_correction == "truncate":
        w_R = w_R.clamp(max=cap)
    else:
        assert objective.sampler_correction == "mask", objective.sampler_correction
        w_R = torch.where((w_R < 1 / cap) | (w_R > cap), 0.0, w_R)
    return torch.repeat_interleave(w_R, lengths_B) if per_token and level == "sequence_mean" else w_R


def aggregate_tokens(values_N: Tensor, lengths_B: Tensor, how: str, step: Step) -> Tensor:
    """This micro-batch's part of the step's aggregate of one value per token (scalar)."""
    if how == "sequence_mean":
        return (rollout_sums(values_N, lengths_B) / lengths_B).sum() / step.num_rollouts
    denominators = {
        "token_mean": step.num_tokens,
        "constant": step.num_rollouts * step.max_new_tokens,
        "sequence_sum": step.num_rollouts,
    }
    return values_N.sum() / denominators[how]


def aggregate_rollouts(values_B: Tensor, lengths_B: Tensor, how: str, step: Step) -> Tensor:
    """The same of one value per rollout: their mean, or weighted by length under `token_mean`."""
    if how == "token_mean":
        return (values_B * lengths_B).sum() / step.num_tokens
    return values_B.sum() / step.num_rollouts


def kl_estimate(logprobs_N: Tensor, reference_logprobs_N: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) per token, [N]: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (Schulman)."""
    d_N = logprobs_N - reference_logprobs_N
    if estimator == "k1":
        return d_N
    if estimator == "k2":
        return d_N.square() / 2
    assert estimator == "k3", estimator
    # Both terms are bounded: with the first alone, the gradient beyond would point away from the reference.
    bounded_N = d_N.clamp(min=-MAX_LOG_RATIO)
    return torch.exp(-bounded_N) + bounded_N - 1


def kl_loss(logprobs_N: Tensor, given: Given, objective: Objective, step: Step) -> Tensor:
    """The aggregated KL to the reference (scalar, this micro-batch's part), not yet times its coefficient.

    kl_importance: each token's estimate is multiplied by its importance ratio, or its rollout's, through
    which the gradient flows. Finite in float32: the ratio and exp(-d) of k3 are at most e^20 each.
    """
    assert given.reference_logprobs_N is not None
    k_N = kl_estimate(logprobs_N, given.reference_logprobs_N, objective.kl_estimator)
    if objective.kl_importance:
        ratio_R = torch.exp(log_ratio(logprobs_N, given.old_logprobs_N, given.lengths_B, objective.ratio))
        per_token = objective.ratio == "token"
        k_N = k_N * (ratio_R if per_token else torch.repeat_interleave(ratio_R, given.lengths_B))
    return aggregate_tokens(k_N, given.lengths_B, objective.aggregate, step)


def surrogate(ratio_R: Tensor, logprobs_N: Tensor, advantages_R: Tensor, objective: Objective) -> Tensor:
    """What a step maximises, [R].

    clip: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), where delta caps rho itself, which bounds the
    value for A < 0 too (two-sided clipping, arXiv 2505.07291). cispo: clip(rho) A logprob with rho held
    constant (arXiv 2506.13585); it has ratio `token` and no delta.
    """
    if objective.surrogate == "cispo":
        return ratio_R.detach().clamp(*objective.bounds) * advantages_R * logprobs_N
    assert objective.surrogate == "clip", objective.surrogate
    capped_R = ratio_R.clamp(max=objective.cap)
    return torch.minimum(capped_R * advantages_R, capped_R.clamp(*objective.bounds) * advantages_R)


def clipped(ratio_R: Tensor, advantages_R: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(below, above), bool [R], True where a ratio was clipped.

    clip: where the gradient is 0, which depends on the sign of the advantage, above delta for either sign.
    cispo: every ratio outside; its token keeps a gradient, with the bound as weight.
    """
    low, high = objective.bounds
    below_R, above_R = ratio_R < low, ratio_R > high
    if objective.surrogate == "cispo":
        return below_R, above_R
    capped_R = (ratio_R > objective.cap) & (advantages_R != 0)
    return below_R & (advantages_R < 0), (above_R & (advantages_R > 0)) | capped_R


def policy_loss(logprobs_N: Tensor, given: Given, objective: Objective, step: Step) -> tuple[Tensor, Tensor]:
    """Minus the aggregated surrogate (scalar, this micro-batch's part), and the ratios [R], detached.

    weights_R of `given` change no denominator.
    """
    ratio_R = torch.exp(log_ratio(logprobs_N, given.old_logprobs_N, given.lengths_B, objective.ratio))
    advantages_R = given.by_ratio(given.advantages_B, objective.ratio)
    value_R = surrogate(ratio_R, logprobs_N, advantages_R, objective)
    if given.weights_R is not None:
        value_R = given.weights_R * value_R
    add_up = aggregate_tokens if objective.ratio == "token" else aggregate_rollouts
    return -add_up(value_R, given.lengths_B, objective.aggregate, step), ratio_R.detach()
