"""config.evaluate: the evaluate section of pipeline.yaml: what every few policies are measured on."""

from typing import Annotated, Any

from pydantic import Field

from grpo.config.prompts import PromptsConfig
from grpo.config.section import Count, Section, must

PASS_THRESHOLD = 1.0
_GREEDY_OR_NOT = must(lambda value: not 0 < value < 0.01, "must be 0 (greedy) or at least 0.01")


class EvaluateConfig(Section):
    """evaluate: policy + held-out prompts -> eval_rollouts, eval_rewards.

    By the engine and the rewards of training. The stages read nothing of it: it may be added, changed or
    removed in a run at any time.
    """

    prompts: PromptsConfig
    """What is sampled from: as `prompts`; `arithmetic_held_out` are the sums that `arithmetic` leaves out."""
    every: Count = 10
    """Policies whose number is a multiple of this are measured, the starting one and the last one too."""
    samples_per_prompt: Annotated[int, Field(ge=1, le=2**20)] = 4
    """n, responses per prompt: pass@k is known for k up to it. Greedy: 1."""
    temperature: Annotated[float, Field(ge=0), _GREEDY_OR_NOT] | None = None
    """Sampling temperature, 0 (greedy) or >= 0.01; null: generate.temperature."""
    max_new_tokens: Count | None = None
    """Tokens sampled at most per response; null: generate.max_new_tokens."""
    pass_reward: str | None = None
    """Name of the reward that says whether a response passes; null: the first of score.rewards."""
    pass_threshold: float = PASS_THRESHOLD
    """A response passes where that reward is at least this."""

    def model_post_init(self, context: Any, /) -> None:
        """Raise ValueError where the same response would be sampled again and again."""
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                f"samples_per_prompt: {self.samples_per_prompt} at temperature 0 would be the same response"
                " each time; set it to 1, or give a temperature"
            )
