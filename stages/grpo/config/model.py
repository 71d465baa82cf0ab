"""config.model: the pydantic mirror of pipeline.yaml, one class per section, in stage order.

Every field says its unit, range and what an extreme value means; a field without a default must be given.
`null` is a value described at its field, never "default". The section `update` is in update.py.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from grpo.config.section import Count, NonNegative, Section, plain
from grpo.config.update import OBJECTIVES, UpdateConfig


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
    engine_options: dict[str, Any] = Field({})
    """vLLM's own engine arguments, such as gpu_memory_utilization, tensor_parallel_size, max_num_seqs, dtype
    or quantization. dtype: float32 on a CPU and bfloat16 on a GPU unless given."""
    prompts_per_iteration: Annotated[int, Field(ge=1, le=2**20)] = 32
    """Groups per iteration, 1 to 2**20."""
    samples_per_prompt: Annotated[int, Field(ge=2, le=2**20)] = 4
    """K, responses per group, >= 2: a group of one has no relative advantage."""
    max_new_tokens: Count = 128
    """Tokens sampled at most per response, the end-of-sequence token included."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature, >= 0.01, the least that vLLM takes as it is. Log-probs are those of the tempered
    distribution."""
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
    arguments: dict[str, Any] = Field({})
    """Keyword arguments handed to the function."""
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 60.0
    """Seconds a call for one group may take before its rollouts are tried one by one, at most 1e6."""

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
    workers: Annotated[int, Field(ge=1, le=1024)] = 2
    """Processes that run reward functions, 1 to 1024."""
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


class CheckpointsConfig(Section):
    """What stays on disk. In no stage's fingerprint."""

    keep_last: Annotated[int, Field(ge=2)] | None = 3
    """Checkpoints kept, the newest ones, each with its optimiser state; null: all."""
    keep_every: Count | None = 10
    """Policies whose number is a multiple of this are kept too; null: none of the older ones."""


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

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "Config":
        update = self.update
        num_steps = self.iterations * update.epochs * update.steps_per_iteration
        if update.warmup_steps > num_steps:
            raise ValueError(
                f"update.warmup_steps: {update.warmup_steps} are more than the {num_steps} optimiser steps of"
                " the run (iterations * update.epochs * update.steps_per_iteration); lower it, or raise"
                " `iterations`"
            )
        return self
