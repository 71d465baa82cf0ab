"""losses: the functions of loss.py, each constant of theirs as an argument."""

from typing import Any

from torch import Tensor

from grpo.update import loss
from grpo.update.loss import Given, Objective, Step


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_B: Tensor,
    lengths_B: Tensor,
    *,
    step: Step,
    weights_R: Tensor | None = None,
    **constants: Any,
) -> tuple[Tensor, Tensor]:
    given = Given(lengths_B, advantages_B, old_logprobs_N, weights_R=weights_R)
    return loss.policy_loss(logprobs_N, given, Objective(**constants), step)


def kl_loss(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    lengths_B: Tensor,
    *,
    estimator: str,
    importance: bool,
    step: Step,
    **constants: Any,
) -> Tensor:
    given = Given(lengths_B, lengths_B.new_zeros(len(lengths_B)), old_logprobs_N, reference_logprobs_N)
    objective = Objective(kl_estimator=estimator, kl_importance=importance, **constants)
    return loss.kl_loss(logprobs_N, given, objective, step)


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
    objective = Objective(
        ratio=ratio,
        sampler_correction=correction,
        sampler_correction_level=level,
        sampler_correction_cap=cap,
    )
    return loss.sampler_weights(policy_logprobs_N, sampled_logprobs_N, lengths_B, objective)


def clip_surrogate(
    ratio_R: Tensor, advantages_R: Tensor, low: float | None, high: float | None, delta: float | None = None
) -> Tensor:
    objective = Objective(clip_low=low, clip_high=high, delta=delta)
    return loss.surrogate(ratio_R, ratio_R, advantages_R, objective)


def cispo_surrogate(
    ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor, low: float | None, high: float | None
) -> Tensor:
    objective = Objective(surrogate="cispo", clip_low=low, clip_high=high)
    return loss.surrogate(ratio_N, logprobs_N, advantages_N, objective)


def clipped(
    ratio_R: Tensor,
    advantages_R: Tensor,
    low: float | None,
    high: float | None,
    surrogate: str,
    delta: float | None,
) -> tuple[int, int]:
    objective = Objective(surrogate=surrogate, clip_low=low, clip_high=high, delta=delta)
    below_R, above_R = loss.clipped(ratio_R, advantages_R, objective)
    return int(below_R.sum()), int(above_R.sum())
