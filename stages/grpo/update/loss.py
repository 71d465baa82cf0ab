"""loss: the objective of docs/math.md. Pure functions: tensors in, tensors out.

Shapes: N response tokens of a micro-batch, one rollout after another; B its rollouts; lengths_B tokens of
each, so sum(lengths_B) = N. R is N or B: one value per token, or one per rollout for sequence ratios.

Every denominator is that of the whole optimiser step, so the sum over micro-batches does not depend on how
the step is cut. GRPO alone, in 30 lines, is in docs/math.md; a test runs it against this.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.update.surrogates import SURROGATES, Objective

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


@dataclass(frozen=True)
class Given:
    """What a micro-batch has beside the policy's log-probs, all of it constant.

    old_logprobs_N: pi_old's. reference_logprobs_N: None without a KL term. weights_R: sampler_weights();
    None: no correction.
    """

    lengths_B: Tensor
    advantages_B: Tensor
    old_logprobs_N: Tensor
    reference_logprobs_N: Tensor | None = None
    weights_R: Tensor | None = None

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


def policy_loss(logprobs_N: Tensor, given: Given, objective: Objective, step: Step) -> tuple[Tensor, Tensor]:
    """Minus the aggregated surrogate (scalar, this micro-batch's part), and the ratios [R], detached.

    weights_R of `given` change no denominator.
    """
    ratio_R = torch.exp(log_ratio(logprobs_N, given.old_logprobs_N, given.lengths_B, objective.ratio))
    advantages_R = given.by_ratio(given.advantages_B, objective.ratio)
    value_R = SURROGATES[objective.surrogate].value(ratio_R, logprobs_N, advantages_R, objective)
    if given.weights_R is not None:
        value_R = given.weights_R * value_R
    add_up = aggregate_tokens if objective.ratio == "token" else aggregate_rollouts
    return -add_up(value_R, given.lengths_B, objective.aggregate, step), ratio_R.detach()
