"""config.update: the update section of pipeline.yaml."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from grpo.config.lora import LARGEST, LoraConfig
from grpo.config.section import ADDED, Count, NonEmpty, NonNegative, Positive, Section
from grpo.config.surrogates import READ_BY, SURROGATES, known_surrogate

# The cap of the sampler correction by its level, unless one is given: a mean over tokens strays far less.
SAMPLER_CORRECTION_CAPS = {"token": 2.0, "sequence_mean": 1.01}

Weight = Annotated[float, Field(ge=0, le=LARGEST)]
Temperature = Annotated[float, Field(ge=1e-6, le=LARGEST)]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]


class UpdateConfig(Section):
    """update: policy + rollouts + advantages -> next policy, updates, logprobs."""

    objective: Literal[
        "grpo",
        "grpo_sequence",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
        "sapo",
        "gmpo",
        "dppo",
        "vespo",
        "scalerl",
    ] = "grpo"
    """Sets the keys marked (objective), advantage.scale and .drop_zero_variance; a key written here wins."""
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    """(objective) Importance ratio pi / pi_old: per token, of the sequence, or its geometric mean."""
    surrogate: Annotated[str, AfterValidator(known_surrogate)] = "clip"
    """(objective) What is maximised: clip, cispo, sapo, gmpo, dppo_tv, dppo_kl, vespo (docs/math.md), or
    `module:function` of a file beside the configuration (docs/objectives.md)."""
    clip_low: Annotated[float, Field(ge=0, le=1)] | None = 0.2
    """(objective) The ratio is clipped at 1 - clip_low, 0 <= clip_low <= 1; null: not on this side. gmpo: the
    log-ratio at -clip_low; dppo: how far a token's probability may have fallen (dppo_kl: in KL)."""
    clip_high: Weight | None = 0.2
    """(objective) The ratio is clipped at 1 + clip_high, 0 <= clip_high <= 1e6; null: not on this side. gmpo:
    the log-ratio at clip_high; dppo: how far a token's probability may have risen (dppo_kl: in KL)."""
    delta: Annotated[float, Field(gt=1, le=LARGEST)] | None = None
    """Two-sided clipping: the ratio is capped here for negative advantages too; > 1 + clip_high, at most 1e6.
    null: their ratios have no cap. Needs surrogate: clip."""
    tau_positive: Annotated[Temperature, ADDED] = 1.0
    """sapo: how fast the gradient fades as the ratio leaves 1, where A > 0; 1e-6 (not at all) to 1e6."""
    tau_negative: Annotated[Temperature, ADDED] = 1.05
    """The same where A < 0."""
    ratio_cap: Annotated[float, Field(ge=1, le=LARGEST), ADDED] = 20.0
    """dppo: the ratio that weighs a token is at most this, 1 to 1e6."""
    k_positive: Annotated[Weight, ADDED] = 2.0
    """vespo: the weight of a rollout is w^k e^(lambda (1 - w)), where A > 0; 0 to 1e6."""
    k_negative: Annotated[Weight, ADDED] = 3.0
    """The same where A < 0."""
    lambda_positive: Annotated[Weight, ADDED] = 3.0
    """vespo: how fast the weight falls for a rollout that became likelier, where A > 0; 0 to 1e6."""
    lambda_negative: Annotated[Weight, ADDED] = 2.0
    """The same where A < 0."""
    aggregate: Literal["sequence_mean", "token_mean", "constant", "sequence_sum", "prompt_mean"] = (
        "sequence_mean"
    )
    """(objective) How tokens and rollouts of an optimiser step are averaged (docs/math.md)."""
    off_policy_mask: Annotated[Weight | None, ADDED] = None
    """A rollout with A < 0 whose tokens became less likely than when sampled by more than this many nats, in
    the mean, gives no policy gradient; 0 to 1e6. null: every rollout does."""
    top_entropy: Annotated[Annotated[float, Field(gt=0, le=1)] | None, ADDED] = None
    """Only this share of the optimiser step's tokens, those of highest entropy, gives a policy gradient;
    1: all, after one more pass. null: all. Needs one surrogate value per token."""
    kl_coefficient: Weight = 0.01
    """(objective) Weight of the KL term; 0 loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """(objective) Estimator of the KL per token."""
    kl_importance: bool = False
    """true: each token's KL is multiplied by its importance ratio, through which the gradient flows too."""
    entropy_coefficient: Weight = 0.0
    """Weight of the entropy, aggregated as the KL is, which the loss subtracts; 0: no such term."""
    entropy_target: Annotated[Positive | None, ADDED] = None
    """Mean entropy of a token in nats, > 0. At or below it the term is there, and its weight, which begins as
    entropy_coefficient, rises with every step; above it there is none, and it falls. null: it stays."""
    entropy_coefficient_delta: Annotated[Annotated[float, Field(gt=0, le=LARGEST)], ADDED] = 0.005
    """By how much the weight rises or falls in a step; > 0, at most 1e6."""
    entropy_coefficient_min: Annotated[Weight, ADDED] = 0.0
    """It falls no further, 0 to 1e6."""
    entropy_coefficient_max: Annotated[Weight, ADDED] = 1.0
    """It rises no further, 0 to 1e6."""
    old_logprobs: Literal["sampled", "recomputed"] = "sampled"
    """(objective) pi_old: the stored log-probs, or the learner's own before its first step."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Weight w = pi_old / sampler on the surrogate: none, min(w, cap), or w where it lies in [1 / cap, cap]
    and 0 elsewhere. Needs old_logprobs: recomputed."""
    sampler_correction_level: Literal["token", "sequence_mean"] = "token"
    """One weight per token, or the geometric mean of a rollout's; a sequence ratio needs the latter."""
    sampler_correction_cap: Annotated[float, Field(gt=1, le=LARGEST)] = SAMPLER_CORRECTION_CAPS["token"]
    """Cap of the weight, > 1, at most 1e6. Left out: 2.0 for level token, 1.01 for sequence_mean."""
    sampler_correction_floor: Annotated[Annotated[float, Field(gt=0, le=1)] | None, ADDED] = None
    """truncate: the weight is at least this. mask: where a weight is kept from, in place of 1 / cap. > 0, at
    most 1; null: truncate has no such bound, and mask 1 / cap."""
    reference: NonEmpty | None = None
    """Checkpoint of the KL term; null: the starting policy. Fixed for a run."""
    reference_every: Annotated[Count | None, ADDED] = None
    """n: in iteration i the reference is the newest policy whose number is a multiple of n, and before
    iteration n that of `reference`. null: always."""
    optimizer: Annotated[Literal["adamw", "adamw_8bit"], ADDED] = "adamw"
    """adamw_8bit: moments in 8 bits by blocks of 256 values (arXiv 2110.02861): a quarter of their memory and
    disk, for coarser steps. Fixed for a run; needs bitsandbytes: pip install 'grpo-stages[8bit]'."""
    learning_rate: NonNegative = 5e-7
    """Learning rate of AdamW: the highest of the run, where warm-up ends and the schedule begins."""
    min_learning_rate: Annotated[NonNegative, ADDED] = 0.0
    """Where a linear or cosine schedule ends, at most learning_rate; constant has none."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up, to the end of the run: as it is, or down to min_learning_rate in a line or
    a half cosine."""
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Optimiser steps in which the learning rate rises linearly from 0, at most those of the run; 0: none."""
    warmup_share: Annotated[float, Field(ge=0, lt=1), ADDED] = 0.0
    """The same as a share of the run's optimiser steps, rounded up, in place of warmup_steps; 0: none."""
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
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the model's matrix products; never TF32. bfloat16: autocast; weights and optimiser state stay
    float32. auto: bfloat16 where a GPU is, else float32."""
    weights: Annotated[Literal["float32", "bfloat16_master"], ADDED] = "float32"
    """bfloat16_master: what is computed with is a copy in bfloat16; AdamW, sums of gradients and checkpoints
    are in float32. 18 bytes a parameter instead of 16, no casts. Not with precision: float32, nor lora."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """true: activations are computed again in the backward pass: less memory, more time, the same result.
    auto: where those of the longest micro-batch would not fit into the memory that is free."""
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

    def moved_reference(self, iteration: int) -> int:
        """The policy that is the reference in `iteration`; 0: the checkpoint that `reference` names."""
        return iteration - iteration % self.reference_every if self.reference_every else 0

    @property
    def has_entropy_term(self) -> bool:
        """Whether the loss has one, in some step at least."""
        return bool(self.entropy_coefficient) or self.entropy_target is not None

    @property
    def own(self) -> str | None:
        """The surrogate, where it is a function of the user's."""
        return None if self.surrogate in SURROGATES else self.surrogate

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError where one key does not fit another."""
        self._check_surrogate()
        self._check_weights()
        if self.replay_iterations and self.old_logprobs == "recomputed":
            raise ValueError(
                f"replay_iterations: {self.replay_iterations} needs old_logprobs: sampled; recomputed takes"
                " the present policy for the one that sampled, and every older rollout's ratio would be 1"
            )
        self._check_schedule()
        self._check_regularisers()
        correction = self.sampler_correction
        if correction == "none" and self.sampler_correction_floor is not None:
            raise ValueError(
                f"sampler_correction_floor: {self.sampler_correction_floor} bounds the weight of a"
                " sampler_correction; set it to truncate or mask, or leave the floor out"
            )
        if correction != "none" and self.old_logprobs == "sampled":
            raise ValueError(
                f"sampler_correction: {correction} needs old_logprobs: recomputed; with sampled"
                " the ratio itself is to the sampler, and a weight of 1 is right: sampler_correction: none"
            )
        if self.own is not None or self.ratio == "token":
            return
        if correction != "none" and self.sampler_correction_level == "token":
            raise ValueError(
                f"ratio: {self.ratio} has one surrogate value per rollout, which weights per token do not"
                " fit; set sampler_correction_level: sequence_mean"
            )
        if self.top_entropy is not None:
            raise ValueError(
                f"ratio: {self.ratio} has one surrogate value per rollout, of which no token can be left out;"
                " leave top_entropy out, or set ratio: token"
            )

    def _check_weights(self) -> None:
        """Raise ValueError for a copy of the weights that nothing would compute with."""
        if self.weights == "float32":
            return
        if self.precision == "float32":
            raise ValueError(
                f"weights: {self.weights} computes in bfloat16, found precision: float32; set precision:"
                " bfloat16, or leave weights out"
            )
        if self.lora is not None:
            raise ValueError(
                f"weights: {self.weights} is for weights that train, and under lora they do not; leave one of"
                " the two out"
            )

    def _check_regularisers(self) -> None:
        """Raise ValueError for a key of the KL or entropy term that has no effect or cannot be had."""
        if self.reference_every is not None and not self.kl_coefficient:
            raise ValueError(
                f"reference_every: {self.reference_every} moves the reference of a KL term, which"
                " kl_coefficient: 0 has not; set kl_coefficient, or leave reference_every out"
            )
        low, high = self.entropy_coefficient_min, self.entropy_coefficient_max
        if self.entropy_target is not None:
            if not low <= self.entropy_coefficient <= high:
                raise ValueError(
                    f"entropy_coefficient: {self.entropy_coefficient} must lie between"
                    f" entropy_coefficient_min: {low} and entropy_coefficient_max: {high}"
                )
            return
        for key in ("entropy_coefficient_delta", "entropy_coefficient_min", "entropy_coefficient_max"):
            if (value := getattr(self, key)) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: {value} is for entropy_target; set that too, or leave {key} out")

    def _check_schedule(self) -> None:
        """Raise ValueError for a key of the schedule that has no effect."""
        lowest = self.min_learning_rate
        if lowest and self.schedule == "constant":
            raise ValueError(
                f"min_learning_rate: {lowest} is where a schedule ends; set schedule: linear or cosine, or"
                " leave it out"
            )
        if lowest > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: {lowest} must be at most learning_rate: {self.learning_rate}, where the"
                " schedule begins"
            )
        if self.warmup_share and self.warmup_steps:
            raise ValueError(
                f"warmup_share: {self.warmup_share} and warmup_steps: {self.warmup_steps} say the same thing;"
                " give one of them"
            )

    def _check_surrogate(self) -> None:
        """Raise ValueError for a key that does not fit the surrogate, or that it does not read."""
        ratio = SURROGATES.get(self.surrogate)
        if ratio not in (None, self.ratio):
            gives = "weighs tokens" if ratio == "token" else "is a geometric mean over the response"
            raise ValueError(
                f"surrogate: {self.surrogate} {gives}, found ratio: {self.ratio}; set ratio: {ratio}"
            )
        if self.surrogate == "cispo" and self.delta is not None:
            raise ValueError(
                f"delta: {self.delta} is for surrogate: clip; the clip_high of cispo caps the ratio for"
                " advantages of both signs: leave delta out"
            )
        for key, readers in READ_BY.items():
            value = getattr(self, key)
            without = None if key.startswith("clip_") else type(self).model_fields[key].default
            if value != without and self.surrogate not in readers:
                raise ValueError(
                    f"{key}: {value} is for surrogate: {' or '.join(readers)}; {self.surrogate} does not read"
                    f" it: leave {key} out{', or set it to null' if without is None else ''}"
                )
        if self.delta is not None and self.clip_high is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(
                f"delta: {self.delta} must be greater than 1 + clip_high = {1 + self.clip_high:g}, where the"
                " ratio of a positive advantage is already clipped"
            )
