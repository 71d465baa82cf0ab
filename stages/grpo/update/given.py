"""given: what a loss is computed from: its constants, the denominators of a step, a micro-batch's tensors.

Shapes: N response tokens of a micro-batch, one rollout after another; B its rollouts; lengths_B tokens of
each, so sum(lengths_B) = N. R is N or B: one ratio per token, or one per rollout. V is N or B too: one value
of the surrogate per token or per rollout, which is R for every surrogate but the user's own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.update.own_surrogate import OwnSurrogate

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
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    ratio_cap: float = 20.0
    k_positive: float = 2.0
    k_negative: float = 3.0
    lambda_positive: float = 3.0
    lambda_negative: float = 2.0
    aggregate: str = "sequence_mean"
    off_policy_mask: float | None = None
    top_entropy: float | None = None
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    kl_importance: bool = False
    entropy_coefficient: float = 0.0
    sampler_correction: str = "none"
    sampler_correction_level: str = "token"
    sampler_correction_cap: float = 2.0
    sampler_correction_floor: float | None = None
    own: OwnSurrogate | None = None  # what `surrogate` names, where that is the user's

    @property
    def per_rollout(self) -> bool:
        """Whether the surrogate has one value per rollout, and not one per token."""
        return self.ratio != "token" if self.own is None else self.own.per_rollout

    @property
    def bounds(self) -> tuple[float, float]:
        """What the ratio is clipped to; infinite on a side that is not clipped."""
        low, high = self.room
        return 1 - low, 1 + high

    @property
    def room(self) -> tuple[float, float]:
        """clip_low and clip_high as distances; infinite on a side that is not clipped."""
        low = math.inf if self.clip_low is None else self.clip_low
        return low, math.inf if self.clip_high is None else self.clip_high

    @property
    def cap(self) -> float:
        """The largest ratio for advantages of either sign; infinite without delta."""
        return math.inf if self.delta is None else self.delta


@dataclass(frozen=True)
class Step:
    """What one optimiser step has over all its micro-batches: its denominators above all."""

    num_rollouts: int  # kept ones, which docs/math.md calls N
    num_tokens: int  # the sum of T_i
    max_new_tokens: int  # what the rollouts were sampled with
    num_groups: int = 0  # those with a kept rollout, which docs/math.md calls G; only `prompt_mean` asks
    entropy_bound: float | None = None  # below it a token is left out; only top_entropy asks


@dataclass(frozen=True)
class Given:
    """What a micro-batch has beside the policy's log-probs, all of it constant."""

    lengths_B: Tensor
    advantages_N: Tensor  # of a rollout's tokens all the same, unless a teacher says otherwise
    old_logprobs_N: Tensor  # of pi_old
    reference_logprobs_N: Tensor | None = None  # without a KL term
    weights_V: Tensor | None = None  # sampler_weights(), or no correction
    group_tokens_B: Tensor | None = None  # kept tokens of the rollout's group; only `prompt_mean` asks
    sampled_logprobs_N: Tensor | None = None  # of the sampler; only off_policy_mask asks
    low_entropy_N: Tensor | None = None  # bool, True where top_entropy leaves a token out

    def advantages(self, like: Tensor) -> Tensor:
        """One advantage per value of `like`, which is [N] or [B]: a rollout's is that of its first token."""
        per_token = len(like) == len(self.advantages_N)
        return (
            self.advantages_N if per_token else self.advantages_N[self.lengths_B.cumsum(0) - self.lengths_B]
        )

    def rollouts(self) -> Tensor:
        """The rollout of each token, int64 [N], from 0."""
        numbers_B = torch.arange(len(self.lengths_B), device=self.lengths_B.device)
        return torch.repeat_interleave(numbers_B, self.lengths_B)

    def spread(self, values_B: Tensor, like: Tensor) -> Tensor:
        """One value per rollout as one per value of `like`, which is [N] or [B]."""
        per_token = len(like) == len(self.advantages_N)
        return torch.repeat_interleave(values_B, self.lengths_B) if per_token else values_B

    def sums(self, values_N: Tensor) -> Tensor:
        """Sum over the tokens of each rollout, [B]."""
        return rollout_sums(values_N, self.lengths_B)


def rollout_sums(values_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Sum over the tokens of each rollout, [B]."""
    return torch.segment_reduce(values_N, "sum", lengths=lengths_B, axis=0, initial=0.0)
