"""surrogates: what a step maximises, by the name it has in pipeline.yaml. The formulas are in docs/math.md.

Each is a pure function (ratio_R, logprobs_N, given, objective) -> value [R], the ratio being of `given`'s
pi_old. Shapes as in given.py; where a surrogate weighs the log-prob, its weight is held constant.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grpo.update.given import MAX_LOG_RATIO, Given, Objective

MIN_LOG_WEIGHT = math.log(1e-8)  # of a rollout under vespo, which goes on to 0 there

Surrogate = Callable[[Tensor, Tensor, Given, Objective], Tensor]
Sides = tuple[Tensor, Tensor]  # bool, True where a value was clipped: below, above


def clip(ratio_R: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Tensor:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), of any ratio.

    delta caps rho itself, which bounds the value for A < 0 too (two-sided clipping, arXiv 2505.07291).
    """
    advantages_R, capped_R = given.advantages(like=ratio_R), ratio_R.clamp(max=objective.cap)
    return torch.minimum(capped_R * advantages_R, capped_R.clamp(*objective.bounds) * advantages_R)


def cispo(ratio_N: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Tensor:
    """clip(rho) A logprob (arXiv 2506.13585)."""
    return ratio_N.detach().clamp(*objective.bounds) * given.advantages_N * logprobs_N


def sapo(ratio_R: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Tensor:
    """4 / tau sigmoid(tau (rho - 1)) A, tau by the sign of A (arXiv 2511.20347)."""
    advantages_R = given.advantages(like=ratio_R)
    tau_R = _by_sign(advantages_R, objective.tau_positive, objective.tau_negative, ratio_R)
    return 4 / tau_R * torch.sigmoid(tau_R * (ratio_R - 1)) * advantages_R


def gmpo(ratio_B: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Tensor:
    """exp(mean_t e_t) A, e_t = log rho_t clipped on the side A pushes it to; [B] (arXiv 2507.20673)."""
    low, high = objective.room
    d_N = logprobs_N - given.old_logprobs_N
    clipped_N = torch.where(given.advantages_N > 0, d_N.clamp(max=high), d_N.clamp(min=-low))
    mean_B = given.sums(clipped_N) / given.lengths_B
    return mean_B.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * given.advantages(like=ratio_B)


def dppo(ratio_N: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Tensor:
    """min(rho, ratio_cap) A logprob, 0 where the policy already went too far (arXiv 2602.04879)."""
    below_N, above_N = _too_far(ratio_N, logprobs_N, given, objective)
    weight_N = ratio_N.detach().clamp(max=objective.ratio_cap).masked_fill(below_N | above_N, 0.0)
    return weight_N * given.advantages_N * logprobs_N


def vespo(ratio_N: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Tensor:
    """phi A logprob, log phi = lambda + k log w - lambda w, w the ratio of the rollout; k, lambda by sign."""
    d_B = given.sums((logprobs_N - given.old_logprobs_N).detach())
    log_w_N = given.spread(d_B.clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO), like=logprobs_N)
    k_N = _by_sign(given.advantages_N, objective.k_positive, objective.k_negative, logprobs_N)
    lambdas = objective.lambda_positive, objective.lambda_negative
    lambda_N = _by_sign(given.advantages_N, *lambdas, logprobs_N)
    log_phi_N = lambda_N + k_N * log_w_N - lambda_N * log_w_N.exp()
    return log_phi_N.clamp(max=MAX_LOG_RATIO).exp() * given.advantages_N * logprobs_N


def of_the_user(ratio_R: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Tensor:
    """What the user's function makes of the micro-batch, [V]. EngineError (exit 8) for no such tensor."""
    assert objective.own is not None
    return objective.own(logprobs_N, given.old_logprobs_N, given.advantages_N, given.rollouts())


def clipped_by_ratio(ratio_R: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Sides:
    """Where the gradient of `clip` is 0, which depends on the sign of A, above delta for either sign."""
    (low, high), advantages_R = objective.bounds, given.advantages(like=ratio_R)
    capped_R = (ratio_R > objective.cap) & (advantages_R != 0)
    return (ratio_R < low) & (advantages_R < 0), ((ratio_R > high) & (advantages_R > 0)) | capped_R


def outside_bounds(ratio_N: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Sides:
    """Every ratio that cispo clips; its token keeps a gradient, with the bound as weight."""
    low, high = objective.bounds
    return ratio_N < low, ratio_N > high


def clipped_in_the_exponent(ratio_B: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Sides:
    """The tokens that gmpo clips, [N]."""
    (low, high), d_N = objective.room, logprobs_N - given.old_logprobs_N
    return (d_N < -low) & (given.advantages_N < 0), (d_N > high) & (given.advantages_N > 0)


def _too_far(ratio_N: Tensor, logprobs_N: Tensor, given: Given, objective: Objective) -> Sides:
    """Where dppo masks a token, by the distance of the Bernoullis of p (the policy) and q (pi_old)."""
    low, high = objective.room
    log_p_N, log_q_N = logprobs_N.detach().clamp(max=0.0), given.old_logprobs_N.clamp(max=0.0)
    p_N, q_N = log_p_N.exp(), log_q_N.exp()
    distance_N = (p_N - q_N).abs()
    if objective.surrogate == "dppo_kl":
        # log(1 - p) by expm1, which keeps its digits as p goes to 1; where q is 1 its term is 0, not 0 * inf.
        rest_N = (-torch.expm1(log_q_N)).log() - (-torch.expm1(log_p_N)).log()
        distance_N = q_N * (log_q_N - log_p_N) + torch.where(q_N < 1, (1 - q_N) * rest_N, 0.0)
    below_N = (p_N < q_N) & (given.advantages_N < 0) & (distance_N > low)
    return below_N, (p_N > q_N) & (given.advantages_N > 0) & (distance_N > high)


def _by_sign(advantages_R: Tensor, positive: float, negative: float, like: Tensor) -> Tensor:
    """`positive` where A > 0, else `negative`, [R], in the type of `like`."""
    return torch.where(advantages_R > 0, like.new_tensor(positive), like.new_tensor(negative))


SURROGATES: dict[str, Surrogate] = {
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "dppo_tv": dppo,
    "dppo_kl": dppo,
    "vespo": vespo,
}
CLIPPED: dict[str, Callable[[Tensor, Tensor, Given, Objective], Sides]] = {
    "clip": clipped_by_ratio,
    "cispo": outside_bounds,
    "gmpo": clipped_in_the_exponent,
    "dppo_tv": _too_far,
    "dppo_kl": _too_far,
}
"""What a surrogate clips; one that is not here has no bound to reach."""
