"""config.score: the score section of pipeline.yaml, and the rewards in it."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from grpo.config.judge import JudgeConfig
from grpo.config.section import Count, Plain, Section

MODEL_TIMEOUT_S = 3600.0  # a batch of a large reward model on a CPU takes minutes, and is no hang


class RewardConfig(Section):
    """One reward: a function, a reward model or a judge."""

    function: str | None = None
    """A built-in name or `package.module:function`; the configuration's folder comes first on sys.path."""
    model: str | None = None
    """Directory or hub id of a sequence-classification checkpoint with one label."""
    judge: JudgeConfig | None = None
    """A language model behind an OpenAI-compatible endpoint, asked about every rollout."""
    name: str = ""
    """Name in the tables; empty: the function's or the directory's name, or `judge`. Unique."""
    weight: float = 1.0
    """Weight in the sum. 0: computed and stored, changes nothing: the way to compare rewards."""
    arguments: Plain = Field({})
    """Keyword arguments handed to the function."""
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 60.0
    """Seconds, at most 1e6: of a function's call for one group, before its rollouts are tried one by one; of
    one request to a judge; of one batch of a reward model (3600 unless given), which ends the command."""

    @model_validator(mode="before")
    @classmethod
    def _name_and_time_it(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        function, model, judge = (data.get(kind) for kind in ("function", "model", "judge"))
        name = "" if judge is None else "judge"
        if isinstance(model, str):
            name = model.rstrip("/").rpartition("/")[2]
        if isinstance(function, str):
            name = function.rpartition(":")[2]
        times = {} if model is None else {"timeout_s": MODEL_TIMEOUT_S}
        return {**times, **data, "name": data.get("name") or name}

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError unless it is of one kind, with what is of that kind."""
        if [self.function, self.model, self.judge].count(None) != 2:
            raise ValueError("exactly one of function, model and judge must be given")
        if self.function is None and self.arguments:
            kind = "reward model" if self.judge is None else "judge"
            raise ValueError(f"arguments are for functions; a {kind} takes none")


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
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two rewards are named {twice[0]}; give one of them another `name`")
        return rewards
