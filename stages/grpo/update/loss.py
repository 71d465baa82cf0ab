"""loss: the objective of docs/math.md. Pure functions: tensors in, tensors out.

Shapes: N response tokens of a micro-batch, one rollout after another; B its rollouts; lengths_B tokens of
each, so sum(lengths_B) = N. R is N or B: one value per token, or one per rollout for sequence ratios.

Every denominator is that of the whole optimiser step and comes from the table, before the first forward
pass: so the sum over micro-batches does not depend on how the step is cut.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# e^20 = 4.9e8: beyond it an importance ratio says only that the policies have nothing in common. Below it
# exp() is finite in float32 and so is its gradient; without the bound min() would multiply inf by 0.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Step:
    """Denominators of one optimiser step over all its micro-batches.

    num_rollouts: the kept rollouts, which docs/math.md calls N. num_tokens: the sum of T_i.
    max_new_tokens: what the rollouts were sampled with.
    """

    num_rollouts: int
    num_tokens: int
    max_new_tokens: int


def rollout_sums(values_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Sum over the tokens of each rollout, [B]."""
    return torch.segment_reduce(values_N, "sum", lengths=lengths_B, axis=0, initial=0.0)


def log_ratio(logprobs_N: Tensor, old_logprobs_N: Tensor, lengths_B: Tensor, ratio: str) -> Tensor:
    """log rho, [N] for `token`, [B] for `sequence` and `sequence_mean` (GSPO), bounded by MAX_LOG_RATIO."""
    d_N = logprobs_N - old_logprobs_N
    if ratio == "token":
        log_ratio_R = d_N
    elif ratio == "sequence":
        log_ratio_R = rollout_sums(d_N, lengths_B)
    else:
        assert ratio == "sequence_mean", ratio
        log_ratio_R = rollout_sums(d_N, lengths_B) / lengths_B
    return log_ratio_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clip_surrogate(
    ratio_R: Tensor,
    advantages_R: Tensor,
    clip_low: float | None,
    clip_high: float | None,
    delta: float | None = None,
) -> Tensor:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), [R]; None leaves that side unclipped.

    delta caps rho itself, which bounds the value for A < 0 too (two-sided clipping, arXiv 2505.07291).
    """
    capped_R = ratio_R.clamp(max=_cap(delta))
    return torch.minimum(
        capped_R * advantages_R, capped_R.clamp(*_bounds(clip_low, clip_high)) * advantages_R
    )


def cispo_surrogate(
    ratio_N: Tensor,
    logprobs_N: Tensor,
    advantages_N: Tensor,
    clip_low: float | None,
    clip_high: float | None,
) -> Tensor:
    """clip(rho, 1 - clip_low, 1 + clip_high) A logprob, [N], with rho held constant (arXiv 2506.13585)."""
    return ratio_N.detach().clamp(*_bounds(clip_low, clip_high)) * advantages_N * logprobs_N


def clipped(
    ratio_R: Tensor,
    advantages_R: Tensor,
    clip_low: float | None,
    clip_high: float | None,
    surrogate: str,
    delta: float | None,
) -> tuple[int, int]:
    """How many values were clipped, below and above.

    `clip`: those out of the gradient, which depends on the sign of the advantage, above delta for either
    sign. `cispo`: every ratio outside the bounds; its token keeps a gradient, with the bound as its weight.
    """
    low, high = _bounds(clip_low, clip_high)
    below_R, above_R = ratio_R < low, ratio_R > high
    if surrogate == "clip":
        below_R = below_R & (advantages_R < 0)
        above_R = (above_R & (advantages_R > 0)) | ((ratio_R > _cap(delta)) & (advantages_R != 0))
    return int(below_R.sum()), int(above_R.sum())


def _bounds(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    """What the ratio is clipped to; infinite on a side that is not clipped."""
    low = -math.inf if clip_low is None else 1 - clip_low
    high = math.inf if clip_high is None else 1 + clip_high
    return low, high


def _cap(delta: float | None) -> float:
    return math.inf if delta is None else delta


def sampler_weights(
    policy_logprobs_N: Tensor,
    sampled_logprobs_N: Tensor,
    lengths_B: Tensor,
    *,
    ratio: str,
    correction: str,
    level: str,
    cap: float,
) -> Tensor:
    """Detached weight of each surrogate value, [R]: w = exp(policy - sampled), by token or rollout mean.

    policy_logprobs_N: the learner's before its first step of the iteration; sampled_logprobs_N: the
    sampler's. `truncate`: min(w, cap) (truncated importance sampling). `mask`: 0 outside [1 / cap, cap].
    """
    assert ratio == "token" or level == "sequence_mean", (ratio, level)
    w_R = torch.exp(log_ratio(policy_logprobs_N.detach(), sampled_logprobs_N.detach(), lengths_B, level))
    if correction == "truncate":
        w_R = w_R.clamp(max=cap)
    else:
        assert correction == "mask", correction
        w_R = torch.where((w_R < 1 / cap) | (w_R > cap), 0.0, w_R)
    if ratio == "token" and level == "sequence_mean":
        return torch.repeat_interleave(w_R, lengths_B)
    return w_R


def aggregate_tokens(values_N: Tensor, lengths_B: Tensor, how: str, step: Step) -> Tensor:
    """This micro-batch's part of the step's aggregate of one value per token (scalar)."""
    if how == "sequence_mean":
        return (rollout_sums(values_N, lengths_B) / lengths_B).sum() / step.num_rollouts
    if how == "token_mean":
        return values_N.sum() / step.num_tokens
    if how == "constant":
        return values_N.sum() / (step.num_rollouts * step.max_new_tokens)
    assert how == "sequence_sum", how
    return values_N.sum() / step.num_rollouts


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


def kl_loss(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    lengths_B: Tensor,
    *,
    estimator: str,
    importance: bool,
    ratio: str,
    aggregate: str,
    step: Step,
) -> Tensor:
    """The aggregated KL to the reference (scalar, this micro-batch's part), not yet times its coefficient.

    importance: each token's estimate is multiplied by its importance ratio, or its rollout's, through which
    the gradient flows. Finite in float32: the ratio and exp(-d) of k3 are at most e^20 each.
    """
    k_N = kl_estimate(logprobs_N, reference_logprobs_N, estimator)
    if importance:
        ratio_R = torch.exp(log_ratio(logprobs_N, old_logprobs_N, lengths_B, ratio))
        k_N = k_N * (ratio_R if ratio == "token" else torch.repeat_interleave(ratio_R, lengths_B))
    return aggregate_tokens(k_N, lengths_B, aggregate, step)


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_B: Tensor,
    lengths_B: Tensor,
    *,
    ratio: str,
    clip_low: float | None,
    clip_high: float | None,
    aggregate: str,
    step: Step,
    surrogate: str = "clip",
    delta: float | None = None,
    weights_R: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Minus the aggregated surrogate (scalar, this micro-batch's part), and the ratios [R], detached.

    old_logprobs_N are pi_old's. surrogate: `clip`, or `cispo`, which has ratio `token` and no delta.
    weights_R: sampler_weights(), which change no denominator; None: no correction.
    """
    ratio_R = torch.exp(log_ratio(logprobs_N, old_logprobs_N, lengths_B, ratio))
    per_token = ratio == "token"
    advantages_R = torch.repeat_interleave(advantages_B, lengths_B) if per_token else advantages_B
    if surrogate == "cispo":
        assert per_token, ratio
        assert delta is None, delta
        value_R = cispo_surrogate(ratio_R, logprobs_N, advantages_R, clip_low, clip_high)
    else:
        assert surrogate == "clip", surrogate
        value_R = clip_surrogate(ratio_R, advantages_R, clip_low, clip_high, delta)
    if weights_R is not None:
        value_R = weights_R * value_R
    add_up = aggregate_tokens if per_token else aggregate_rollouts
    return -add_up(value_R, lengths_B, aggregate, step), ratio_R.detach()
