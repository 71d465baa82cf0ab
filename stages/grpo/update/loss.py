"""loss: the objective of docs/math.md. Pure functions: tensors in, tensors out.

Ratio, weights, masks, aggregates and KL; what is maximised is in surrogates.py, and the shapes in given.py.
Every denominator is that of the whole optimiser step, so the sum over micro-batches does not depend on how
the step is cut. GRPO alone, in 30 lines, is in docs/math.md; a test runs it against this.
"""

import torch
from torch import Tensor

from grpo.update.given import MAX_LOG_RATIO, Given, Objective, Step, rollout_sums
from grpo.update.surrogates import CLIPPED, SURROGATES, of_the_user


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
    """Detached weight of each surrogate value, [V]: w = exp(policy - sampled), by token or rollout mean.

    policy_logprobs_N: the learner's before its first step of the iteration; sampled_logprobs_N: the
    sampler's. `truncate`: min(w, cap) (truncated importance sampling). `mask`: 0 outside [1 / cap, cap].
    A floor bounds `truncate` from below, and is the lower end of `mask`.
    """
    level, cap = objective.sampler_correction_level, objective.sampler_correction_cap
    floor = objective.sampler_correction_floor
    assert not objective.per_rollout or level == "sequence_mean", (objective.surrogate, level)
    w_R = torch.exp(log_ratio(policy_logprobs_N.detach(), sampled_logprobs_N.detach(), lengths_B, level))
    if objective.sampler_correction == "truncate":
        w_R = w_R.clamp(min=floor, max=cap)
    else:
        assert objective.sampler_correction == "mask", objective.sampler_correction
        w_R = torch.where((w_R < (floor or 1 / cap)) | (w_R > cap), 0.0, w_R)
    per_token = not objective.per_rollout and level == "sequence_mean"
    return torch.repeat_interleave(w_R, lengths_B) if per_token else w_R


def off_policy(logprobs_N: Tensor, given: Given, objective: Objective) -> Tensor:
    """Which rollouts the policy has left behind, bool [B]: mean_t(sampled - logprob) > off_policy_mask.

    Off-policy sequence masking of DeepSeek-V3.2 (arXiv 2512.02556): to the sampler, whatever pi_old is.
    """
    assert given.sampled_logprobs_N is not None
    assert objective.off_policy_mask is not None
    gap_B = given.sums(given.sampled_logprobs_N - logprobs_N.detach()) / given.lengths_B
    return gap_B > objective.off_policy_mask


def masked(values_V: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Tensor:
    """The surrogate's values with 0 for a token of low entropy, and for A < 0 in an off_policy() rollout."""
    if given.low_entropy_N is not None:
        values_V = values_V.masked_fill(given.low_entropy_N, 0.0)
    if objective.off_policy_mask is not None:
        left_V = given.spread(off_policy(logprobs_N, given, objective), like=values_V)
        values_V = values_V.masked_fill(left_V & (given.advantages(like=values_V) < 0), 0.0)
    return values_V


def aggregate_tokens(values_N: Tensor, given: Given, how: str, step: Step) -> Tensor:
    """This micro-batch's part of the step's aggregate of one value per token (scalar)."""
    if how == "sequence_mean":
        return (given.sums(values_N) / given.lengths_B).sum() / step.num_rollouts
    if how == "prompt_mean":
        assert given.group_tokens_B is not None
        return (given.sums(values_N) / given.group_tokens_B).sum() / step.num_groups
    denominators = {
        "token_mean": step.num_tokens,
        "constant": step.num_rollouts * step.max_new_tokens,
        "sequence_sum": step.num_rollouts,
    }
    return values_N.sum() / denominators[how]


def aggregate_rollouts(values_B: Tensor, given: Given, how: str, step: Step) -> Tensor:
    """The same of one value per rollout: their mean, weighted by length under the two means over tokens."""
    if how == "token_mean":
        return (values_B * given.lengths_B).sum() / step.num_tokens
    if how == "prompt_mean":
        assert given.group_tokens_B is not None
        return (values_B * given.lengths_B / given.group_tokens_B).sum() / step.num_groups
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
        k_N = k_N * (ratio_R if objective.ratio == "token" else given.spread(ratio_R, like=k_N))
    return aggregate_tokens(k_N, given, objective.aggregate, step)


def clipped(
    ratio_R: Tensor, logprobs_N: Tensor, given: Given, objective: Objective
) -> tuple[Tensor, Tensor] | None:
    """(below, above), bool, True where a value was clipped: [R], or [N] for gmpo; None: nothing can be."""
    sides = CLIPPED.get(objective.surrogate)
    return None if sides is None else sides(ratio_R, logprobs_N.detach(), given, objective)


def policy_loss(logprobs_N: Tensor, given: Given, objective: Objective, step: Step) -> tuple[Tensor, Tensor]:
    """Minus the aggregated surrogate (scalar, this micro-batch's part), and the ratios [R], detached.

    Neither weights_V of `given` nor a mask changes a denominator.
    """
    ratio_R = torch.exp(log_ratio(logprobs_N, given.old_logprobs_N, given.lengths_B, objective.ratio))
    surrogate = SURROGATES[objective.surrogate] if objective.own is None else of_the_user
    value_V = masked(surrogate(ratio_R, logprobs_N, given, objective), logprobs_N, given, objective)
    if given.weights_V is not None:
        value_V = given.weights_V * value_V
    add_up = aggregate_rollouts if objective.per_rollout else aggregate_tokens
    return -add_up(value_V, given, objective.aggregate, step), ratio_R.detach()
