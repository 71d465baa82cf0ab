"""losses: the functions of loss.py, each constant of theirs as an argument."""

from typing import Any

import torch
from torch import Tensor

from grpo.update import loss
from grpo.update.given import Given, Objective, Step
from grpo.update.surrogates import SURROGATES


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
    advantages_N = advantages_B.repeat_interleave(lengths_B)
    given = Given(lengths_B, advantages_N, old_logprobs_N, weights_V=weights_R, group_tokens_B=lengths_B)
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
    given = Given(
        lengths_B,
        torch.zeros_like(old_logprobs_N),
        old_logprobs_N,
        reference_logprobs_N,
        group_tokens_B=lengths_B,
    )
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


def of_one_token(advantages_B: Tensor) -> Given:
    """Rollouts of one token each: a value per token is one per rollout."""
    return Given(torch.ones(len(advantages_B), dtype=torch.int64), advantages_B, advantages_B)


def aggregate_tokens(
    values_N: Tensor, lengths_B: Tensor, how: str, step: Step, group_tokens_B: Tensor | None = None
) -> Tensor:
    given = Given(lengths_B, values_N, values_N, group_tokens_B=group_tokens_B)
    return loss.aggregate_tokens(values_N, given, how, step)


def aggregate_rollouts(
    values_B: Tensor, lengths_B: Tensor, how: str, step: Step, group_tokens_B: Tensor | None = None
) -> Tensor:
    given = Given(lengths_B, values_B, values_B, group_tokens_B=group_tokens_B)
    return loss.aggregate_rollouts(values_B, given, how, step)


def clip_surrogate(
    ratio_R: Tensor, advantages_R: Tensor, low: float | None, high: float | None, delta: float | None = None
) -> Tensor:
    objective = Objective(clip_low=low, clip_high=high, delta=delta)
    return SURROGATES["clip"](ratio_R, ratio_R, of_one_token(advantages_R), objective)


def cispo_surrogate(
    ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor, low: float | None, high: float | None
) -> Tensor:
    objective = Objective(surrogate="cispo", clip_low=low, clip_high=high)
    return SURROGATES["cispo"](ratio_N, logprobs_N, of_one_token(advantages_N), objective)


def clipped(
    ratio_R: Tensor,
    advantages_R: Tensor,
    low: float | None,
    high: float | None,
    surrogate: str,
    delta: float | None,
) -> tuple[int, int]:
    objective = Objective(surrogate=surrogate, clip_low=low, clip_high=high, delta=delta)
    sides = loss.clipped(ratio_R, ratio_R, of_one_token(advantages_R), objective)
    assert sides is not None
    return int(sides[0].sum()), int(sides[1].sum())
