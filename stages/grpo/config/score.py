"""config.score: the score section of pipeline.yaml, and the rewards in it."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from grpo.config.section import Count, Section, plain


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
