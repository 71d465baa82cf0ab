"""surrogates: name -> the value that a step maximises, and which values were clipped. Pure functions.

Shapes: N response tokens; R is N or, for sequence ratios, the number of rollouts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """The constants of a loss, by their names in pipeline.yaml: config/update.py says what each means.

    Without arguments: GRPO of docs/math.md with no KL term.
    """

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


def clip_surrogate(ratio_R: Tensor, _logprobs: Tensor, advantages_R: Tensor, objective: Objective) -> Tensor:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), [R]; None leaves that side unclipped.

    delta caps rho itself, which bounds the value for A < 0 too (two-sided clipping, arXiv 2505.07291).
    """
    capped_R = ratio_R.clamp(max=objective.cap)
    return torch.minimum(capped_R * advantages_R, capped_R.clamp(*objective.bounds) * advantages_R)


def clip_clipped(ratio_R: Tensor, advantages_R: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(below, above), bool [R], True where the gradient is 0.

    That depends on the sign of the advantage, above delta for either sign.
    """
    low, high = objective.bounds
    above_R = ((ratio_R > high) & (advantages_R > 0)) | ((ratio_R > objective.cap) & (advantages_R != 0))
    return (ratio_R < low) & (advantages_R < 0), above_R


def cispo_surrogate(
    ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor, objective: Objective
) -> Tensor:
    """clip(rho, 1 - clip_low, 1 + clip_high) A logprob, [N], with rho held constant (arXiv 2506.13585)."""
    return ratio_N.detach().clamp(*objective.bounds) * advantages_N * logprobs_N


def cispo_clipped(ratio_N: Tensor, _advantages: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(below, above), bool [N]: every ratio outside; its token keeps a gradient, with the bound as weight."""
    low, high = objective.bounds
    return ratio_N < low, ratio_N > high


class Surrogate(NamedTuple):
    """value: (ratio_R, logprobs_N, advantages_R, objective) -> [R]; clipped: the same without log-probs."""

    value: Callable[[Tensor, Tensor, Tensor, Objective], Tensor]
    clipped: Callable[[Tensor, Tensor, Objective], tuple[Tensor, Tensor]]


SURROGATES = {
    "clip": Surrogate(clip_surrogate, clip_clipped),
    "cispo": Surrogate(cispo_surrogate, cispo_clipped),  # has ratio `token` and no delta
}
