"""config.model: the pydantic mirror of pipeline.yaml, one class per section, in stage order.

Every field says its unit, range and what an extreme value means; a field without a default must be given.
`null` is a value described at its field, never "default".
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# What an objective sets, by section (docs/math.md). A key written by the user wins.
OBJECTIVES: dict[str, dict[str, dict[str, Any]]] = {
    "grpo": {
        "update": {
            "ratio": "token",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregate": "sequence_mean",
            "kl_coefficient": 0.01,
            "kl_estimator": "k3",
            "old_logprobs": "sampled",
        },
        "advantage": {"scale": "group"},
    },
    "grpo_sequence": {
        "update": {
            "ratio": "sequence",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregate": "sequence_sum",
            "kl_coefficient": 0.01,
            "kl_estimator": "k1",
            "old_logprobs": "recomputed",
        },
        "advantage": {"scale": "group"},
    },
}

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A section of pipeline.yaml: strict types, no unknown keys, no nan or inf, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, if they survive being written as JSON: they become part of a fingerprint."""
    try:
        same = json.loads(json.dumps(values, allow_nan=False)) == values
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError("may hold text, finite numbers, true, false, null, lists and mappings by text")
    return values


class ColumnsConfig(Section):
    """Names of the data set's own columns that play the parts the pipeline knows."""

    prompt: str = "prompt"
    """Column with the prompt text."""
    messages: str = "messages"
    """Column with chat messages, a list of {role, content}; used instead of `prompt` where it is present."""
    answer: str = "answer"
    """Column with the reference answer; may be absent."""


class PromptsConfig(Section):
    """What is sampled from. Fixed for a run."""

    source: str
    """`arithmetic` (built-in task), or a path to .jsonl, .parquet or .csv, relative to the configuration."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which columns of the source hold prompt, messages and answer. Every other column is kept as it is."""
    chat: bool = False
    """true: a text prompt is put to the model as one user message through the tokenizer's chat template."""
    system: str | None = None
    """System message placed before each prompt; null: none. Needs chat prompts."""
    on_long_prompt: Literal["error", "skip"] = "error"
    """A prompt that leaves no room for max_new_tokens: stop, or leave it out and count it. Never cut."""


class GenerateConfig(Section):
    """generate: policy + prompts -> rollouts."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """auto: vllm where it is installed and a GPU is there, else transformers, the built-in engine."""
    engine_options: dict[str, Any] = {}
    """vLLM's own engine arguments, such as gpu_memory_utilization, tensor_parallel_size, max_num_seqs, dtype
    or quantization. dtype: float32 on a CPU and bfloat16 on a GPU unless given."""
    prompts_per_iteration: Count = 32
    """Groups per iteration, >= 1."""
    samples_per_prompt: Annotated[int, Field(ge=2, le=2**20)] = 4
    """K, responses per group, >= 2: a group of one has no relative advantage."""
    max_new_tokens: Count = 128
    """Tokens sampled at most per response, the end-of-sequence token included."""
    temperature: Positive = 1.0
    """Sampling temperature, > 0. Log-probs are those of the tempered distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that together have this probability; 1: from all. vllm only."""
    top_k: Count | None = None
    """Sample from this many of the likeliest tokens; null: from all. vllm only."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Leave out tokens less likely than this share of the likeliest one; 0: none. vllm only."""
    allow_truncated_sampling: bool = False
    """true: allow top_p, top_k and min_p, though the importance ratio is then biased: the learner's log-probs
    are over the whole vocabulary (docs/math.md)."""
    rollouts_per_shard: Count = 2048
    """Rollouts committed at a time, rounded down to whole groups: what a crash can cost at most. One Parquet
    file and row group each, which ~2k rows suit."""
    max_rows_per_batch: Count = 512
    """Rollouts the built-in engine samples at once; bounds its memory."""

    @field_validator("engine_options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        return plain(options)

    def truncation(self) -> str:
        """The key that cuts the distribution, the first of them; empty: none does."""
        cuts = {"top_p": self.top_p < 1, "top_k": self.top_k is not None, "min_p": self.min_p > 0}
        return next((name for name, does in cuts.items() if does), "")

    @model_validator(mode="after")
    def _whole_distribution(self) -> "GenerateConfig":
        if given := self.truncation():
            if not self.allow_truncated_sampling:
                raise ValueError(
                    f"{given} cuts the distribution the policy is sampled from, which biases the"
                    " importance ratio; leave it out, or set allow_truncated_sampling: true"
                )
            if self.engine == "transformers":
                raise ValueError(f"{given} needs engine: vllm; the built-in engine samples from all tokens")
        return self


class RewardConfig(Section):
    """One reward: a function or a reward model."""

    function: str | None = None
    """A built-in name or `package.module:function`; the configuration's folder comes first on sys.path."""
    model: str | None = None
    """Directory or hub id of a sequence-classification checkpoint with one label."""
    name: str = ""
    """Name in the tables; empty: the function's or the directory's name. Unique."""
    weight: float = 1.0
    """Weight in the sum. 0: computed and stored, changes nothing: the way to compare rewards."""
    arguments: dict[str, Any] = {}
    """Keyword arguments handed to the function."""
    timeout_s: Positive = 60.0
    """Seconds a call for one group may take before its rollouts are tried one by one."""

    @field_validator("arguments")
    @classmethod
    def _plain(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        return plain(arguments)

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("name"):
            return data
        if isinstance(data.get("function"), str):
            return {**data, "name": data["function"].rpartition(":")[2]}
        if isinstance(data.get("model"), str):
            return {**data, "name": data["model"].rstrip("/").rpartition("/")[2]}
        return data

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardConfig":
        if (self.function is None) == (self.model is None):
            raise ValueError("exactly one of function and model must be given")
        if self.model is not None and self.arguments:
            raise ValueError("arguments are for functions; a reward model takes none")
        return self


class ScoreConfig(Section):
    """score: rollouts + prompts -> rewards."""

    rewards: Annotated[list[RewardConfig], Field(min_length=1)]
    """What scores a rollout; the reward of a rollout is the weighted sum."""
    on_error: Literal["stop", "drop"] = "stop"
    """Rewards that failed: stop (exit 8; the next run scores only those), or leave the rollouts unscored."""
    workers: Count = 2
    """Processes that run reward functions."""
    max_tokens_per_batch: Count = 16384
    """Tokens a reward model reads at once; bounds its memory."""

    @field_validator("rewards")
    @classmethod
    def _unique(cls, rewards: list[RewardConfig]) -> list[RewardConfig]:
        names = [reward.name for reward in rewards]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rewards are named {name}; give one of them another `name`")
        return rewards


class AdvantageConfig(Section):
    """advantage: rollouts + rewards -> advantages."""

    scale: Literal["group", "batch", "none"] = "group"
    """What r - mean_group is divided by: the group's deviation, the iteration's, or nothing."""
    epsilon: NonNegative = 1e-4
    """Added to the deviation."""
    drop_zero_variance: bool = False
    """true: groups whose rewards are all equal are not trained on."""
    truncated: Literal["keep", "drop"] = "keep"
    """Rollouts that hit max_new_tokens: train on them or not; they count in their group's mean."""
    where: str | None = None
    """SQL condition over `samples`; a rollout that does not meet it is not trained on. null: all."""
    sql: str | None = None
    """File with a query that returns iteration, group_id, sample_id, advantage. null: advantage.sql."""


# The cap of the sampler correction by its level, unless one is given: a mean over tokens strays far less.
SAMPLER_CORRECTION_CAPS = {"token": 2.0, "sequence_mean": 1.01}


class UpdateConfig(Section):
    """update: policy + rollouts + advantages -> next policy, updates, logprobs."""

    objective: Literal["grpo", "grpo_sequence"] = "grpo"
    """Sets the keys below that are marked (objective), and advantage.scale; a key written here wins."""
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    """(objective) Importance ratio pi / pi_old: per token, of the sequence, or its geometric mean."""
    clip_low: Annotated[float, Field(ge=0, le=1)] | None = 0.2
    """(objective) The ratio is clipped at 1 - clip_low; null: not on this side."""
    clip_high: NonNegative | None = 0.2
    """(objective) The ratio is clipped at 1 + clip_high; null: not on this side."""
    aggregate: Literal["sequence_mean", "token_mean", "constant", "sequence_sum"] = "sequence_mean"
    """(objective) How tokens and rollouts of an optimiser step are averaged (docs/math.md)."""
    kl_coefficient: NonNegative = 0.01
    """(objective) Weight of the KL term; 0 loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """(objective) Estimator of the KL per token."""
    old_logprobs: Literal["sampled", "recomputed"] = "sampled"
    """(objective) pi_old: the stored log-probs, or the learner's own before its first step."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Weight w = pi_old / sampler on the surrogate: none, min(w, cap), or w where it lies in [1 / cap, cap]
    and 0 elsewhere. Needs old_logprobs: recomputed."""
    sampler_correction_level: Literal["token", "sequence_mean"] = "token"
    """One weight per token, or the geometric mean of a rollout's; a sequence ratio needs the latter."""
    sampler_correction_cap: Annotated[float, Field(gt=1)] = SAMPLER_CORRECTION_CAPS["token"]
    """Cap of the weight, > 1. Left out: 2.0 for level token, 1.01 for sequence_mean."""
    reference: str | None = None
    """Checkpoint of the KL term; null: the starting policy. Fixed for a run."""
    learning_rate: NonNegative = 5e-7
    """Learning rate of AdamW."""
    betas: Betas = [0.9, 0.999]
    """AdamW's decay rates of the first and second moment."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive | None = 1.0
    """The gradient is scaled down to this norm; null: never."""
    epochs: Count = 1
    """Passes over the kept rollouts of an iteration."""
    steps_per_iteration: Count = 1
    """Optimiser steps per epoch; whole groups are dealt out evenly."""
    max_tokens_per_batch: Count = 16384
    """Tokens of a micro-batch, padding included. Bounds memory, never changes the result."""

    @model_validator(mode="before")
    @classmethod
    def _cap_of_the_level(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        level = str(data.get("sampler_correction_level", "token"))
        cap = SAMPLER_CORRECTION_CAPS.get(level, SAMPLER_CORRECTION_CAPS["token"])
        return {"sampler_correction_cap": cap, **data}

    @model_validator(mode="after")
    def _correction_fits(self) -> "UpdateConfig":
        if self.sampler_correction == "none":
            return self
        if self.old_logprobs == "sampled":
            raise ValueError(
                f"sampler_correction: {self.sampler_correction} needs old_logprobs: recomputed; with sampled"
                " the ratio itself is to the sampler, and a weight of 1 is right: sampler_correction: none"
            )
        if self.ratio != "token" and self.sampler_correction_level == "token":
            raise ValueError(
                f"ratio: {self.ratio} has one surrogate value per rollout, which weights per token do not"
                " fit; set sampler_correction_level: sequence_mean"
            )
        return self


class CheckpointsConfig(Section):
    """What stays on disk. In no stage's fingerprint."""

    keep_optimizers: Annotated[int, Field(ge=2)] | None = 2
    """Optimiser states kept, the newest ones; null: all. `run --from N` needs the one before N."""


class Config(Section):
    """The whole of pipeline.yaml."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the run, a folder below artifacts/."""
    iterations: Count = 100
    """generate -> score -> advantage -> update, this many times."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random. Fixed for a run."""
    model: str
    """The starting policy: a checkpoint directory, a hub id, or `tiny-arithmetic`. Fixed for a run."""
    prompts: PromptsConfig
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig
    advantage: AdvantageConfig = AdvantageConfig()
    update: UpdateConfig = UpdateConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()

    @model_validator(mode="before")
    @classmethod
    def _apply_objective(cls, data: Any) -> Any:
        """Fill in what the objective sets and the user did not write."""
        if not isinstance(data, dict):
            return data
        sections = {name: data.get(name, {}) for name in ("update", "advantage")}
        if not all(isinstance(section, dict) for section in sections.values()):
            return data  # the field's own check says what is wrong
        settings = OBJECTIVES.get(str(sections["update"].get("objective", "grpo")), {})
        return {**data, **{name: {**settings.get(name, {}), **given} for name, given in sections.items()}}
