"""config.update: the update section of pipeline.yaml, and what an objective sets (docs/math.md)."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo.config.section import Count, NonEmpty, NonNegative, Positive, Section

_GRPO: dict[str, Any] = {
    "ratio": "token",
    "surrogate": "clip",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "aggregate": "sequence_mean",
    "kl_coefficient": 0.01,
    "kl_estimator": "k3",
    "old_logprobs": "sampled",
}


def _sets(scale: str = "group", drop_zero_variance: bool = False, **update: Any) -> dict[str, dict[str, Any]]:
    advantage = {"scale": scale, "drop_zero_variance": drop_zero_variance}
    return {"update": _GRPO | update, "advantage": advantage}


# What an objective sets, by section: the same keys for each, written as what differs from grpo. A key that
# the user writes wins.
OBJECTIVES = {
    "grpo": _sets(),
    "grpo_sequence": _sets(
        ratio="sequence", aggregate="sequence_sum", kl_estimator="k1", old_logprobs="recomputed"
    ),
    "dr_grpo": _sets(aggregate="constant", kl_coefficient=0.0, scale="none"),
    "dapo": _sets(clip_high=0.28, aggregate="token_mean", kl_coefficient=0.0, drop_zero_variance=True),
    "gspo": _sets(
        ratio="sequence_mean", clip_low=3e-4, clip_high=4e-4, kl_coefficient=0.0, old_logprobs="recomputed"
    ),
    "cispo": _sets(
        surrogate="cispo", clip_low=None, clip_high=4.0, aggregate="token_mean", kl_coefficient=0.0
    ),
}

# The cap of the sampler correction by its level, unless one is given: a mean over tokens strays far less.
SAMPLER_CORRECTION_CAPS = {"token": 2.0, "sequence_mean": 1.01}

# Far above what anyone means by a bound of a ratio or a weight in the loss, and far below where float32 ends
# (3e38): beyond that a bound cannot be compared, and a weight times 0 is not a number.
LARGEST = 1e6
Weight = Annotated[float, Field(ge=0, le=LARGEST)]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]


class LoraConfig(Section):
    """Low-rank adapters that are trained in place of the weights (arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=2**14)]
    """Rank of an adapter's two matrices, 1 to 16,384; above a weight's smaller side more adds nothing."""
    alpha: Annotated[float, Field(gt=0, le=LARGEST)]
    """An adapter's output is scaled by alpha / rank; > 0, at most 1e6."""
    targets: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Names of the modules that get an adapter, such as q_proj; null: every linear layer but the output's."""


class UpdateConfig(Section):
    """update: policy + rollouts + advantages -> next policy, updates, logprobs."""

    objective: Literal["grpo", "grpo_sequence", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    """Sets the keys marked (objective), advantage.scale and .drop_zero_variance; a key written here wins."""
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    """(objective) Importance ratio pi / pi_old: per token, of the sequence, or its geometric mean."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """(objective) clip: min(ratio A, clipped ratio A). cispo: clipped ratio, held constant, times A logprob,
    so that a clipped token keeps its gradient; needs ratio: token."""
    clip_low: Annotated[float, Field(ge=0, le=1)] | None = 0.2
    """(objective) The ratio is clipped at 1 - clip_low, 0 <= clip_low <= 1; null: not on this side."""
    clip_high: Weight | None = 0.2
    """(objective) The ratio is clipped at 1 + clip_high, 0 <= clip_high <= 1e6; null: not on this side."""
    delta: Annotated[float, Field(gt=1, le=LARGEST)] | None = None
    """Two-sided clipping: the ratio is capped here for negative advantages too; > 1 + clip_high, at most 1e6.
    null: their ratios have no cap. Needs surrogate: clip."""
    aggregate: Literal["sequence_mean", "token_mean", "constant", "sequence_sum"] = "sequence_mean"
    """(objective) How tokens and rollouts of an optimiser step are averaged (docs/math.md)."""
    kl_coefficient: Weight = 0.01
    """(objective) Weight of the KL term; 0 loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """(objective) Estimator of the KL per token."""
    kl_importance: bool = False
    """true: each token's KL is multiplied by its importance ratio, through which the gradient flows too."""
    entropy_coefficient: Weight = 0.0
    """Weight of the entropy, aggregated as the KL is, which the loss subtracts; 0: no such term."""
    old_logprobs: Literal["sampled", "recomputed"] = "sampled"
    """(objective) pi_old: the stored log-probs, or the learner's own before its first step."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Weight w = pi_old / sampler on the surrogate: none, min(w, cap), or w where it lies in [1 / cap, cap]
    and 0 elsewhere. Needs old_logprobs: recomputed."""
    sampler_correction_level: Literal["token", "sequence_mean"] = "token"
    """One weight per token, or the geometric mean of a rollout's; a sequence ratio needs the latter."""
    sampler_correction_cap: Annotated[float, Field(gt=1, le=LARGEST)] = SAMPLER_CORRECTION_CAPS["token"]
    """Cap of the weight, > 1, at most 1e6. Left out: 2.0 for level token, 1.01 for sequence_mean."""
    reference: NonEmpty | None = None
    """Checkpoint of the KL term; null: the starting policy. Fixed for a run."""
    learning_rate: NonNegative = 5e-7
    """Learning rate of AdamW: the highest of the run, where warm-up ends and the schedule begins."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up, to the end of the run: as it is, or to 0 in a line or a half cosine."""
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Optimiser steps in which the learning rate rises linearly from 0, at most those of the run; 0: none."""
    betas: Betas = Field([0.9, 0.999])
    """AdamW's decay rates of the first and second moment."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive | None = 1.0
    """The gradient is scaled down to this norm; null: never."""
    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Passes over the kept rollouts of an iteration, 1 to 1,000."""
    steps_per_iteration: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Optimiser steps per epoch; whole groups are dealt out evenly."""
    replay_iterations: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Kept rollouts of this many iterations before are trained on too, with the log-probs they were sampled
    with as pi_old and the advantages they had; 0: of this iteration alone. Needs old_logprobs: sampled."""
    max_tokens_per_batch: Count = 16384
    """Tokens of a micro-batch, padding included. Bounds memory, never changes the result. On a CPU more than
    4,096 go through together only where one group with its prompt is longer."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the model's matrix products. bfloat16: autocast; weights and optimiser state stay float32."""
    gradient_checkpointing: bool = False
    """true: activations are computed again in the backward pass: less memory, more time, the same result."""
    prompt_sharing: Literal["auto", "off"] = "auto"
    """auto: a group's prompt goes through the model once for its K responses, if that works. off: K times."""
    lora: LoraConfig | None = None
    """Train low-rank adapters; null: all weights."""

    @model_validator(mode="before")
    @classmethod
    def _cap_of_the_level(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sampler_correction_level") == "sequence_mean":
            return {"sampler_correction_cap": SAMPLER_CORRECTION_CAPS["sequence_mean"], **data}
        return data

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError where one key does not fit another."""
        if self.surrogate == "cispo" and self.ratio != "token":
            raise ValueError(f"surrogate: cispo weighs tokens, found ratio: {self.ratio}; set ratio: token")
        if self.surrogate == "cispo" and self.delta is not None:
            raise ValueError(
                f"delta: {self.delta} is for surrogate: clip; the clip_high of cispo caps the ratio for"
                " advantages of both signs: leave delta out"
            )
        if self.delta is not None and self.clip_high is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(
                f"delta: {self.delta} must be greater than 1 + clip_high = {1 + self.clip_high:g}, where the"
                " ratio of a positive advantage is already clipped"
            )
        if self.replay_iterations and self.old_logprobs == "recomputed":
            raise ValueError(
                f"replay_iterations: {self.replay_iterations} needs old_logprobs: sampled; recomputed takes"
                " the present policy for the one that sampled, and every older rollout's ratio would be 1"
            )
        correction = self.sampler_correction
        if correction != "none" and self.old_logprobs == "sampled":
            raise ValueError(
                f"sampler_correction: {correction} needs old_logprobs: recomputed; with sampled"
                " the ratio itself is to the sampler, and a weight of 1 is right: sampler_correction: none"
            )
        if correction != "none" and self.ratio != "token" and self.sampler_correction_level == "token":
            raise ValueError(
                f"ratio: {self.ratio} has one surrogate value per rollout, which weights per token do not"
                " fit; set sampler_correction_level: sequence_mean"
            )
