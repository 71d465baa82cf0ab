"""config.evaluate: how policies are measured, and what follows from it."""

from typing import Annotated, Any

from pydantic import Field

from grpo.config.prompts import PromptsConfig
from grpo.config.section import Count, NonEmpty, NonNegative, Section, must

PASS_THRESHOLD = 1.0
_GREEDY_OR_NOT = must(lambda value: not 0 < value < 0.01, "must be 0 (greedy) or at least 0.01")


class EvaluateConfig(Section):
    """evaluate: policy + held-out prompts -> eval_rollouts, eval_rewards.

    By the engine and the rewards of training. No stage reads it: it may change in a run at any time.
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


class StopConfig(Section):
    """stop: which policy is the best, and for how long `run` goes on without a better one.

    In no stage's fingerprint: it may change in a run at any time.
    """

    metric: NonEmpty = "pass@1"
    """The best policy has the highest: pass@K, `reward` or `rewards.NAME`, means over held-out prompts."""
    patience: Count | None = None
    """`run` ends when so many evaluations in a row, of those every `evaluate.every` policies, found nothing
    better; null: it does not."""
    min_delta: NonNegative = 0.0
    """Better is higher than the best before by more than this."""

    def check(self, samples: int, rewards: list[str]) -> None:
        """Raise ValueError for a metric that no evaluation of `samples` a prompt with `rewards` has."""
        ks = [*(1 << n for n in range(32) if 1 << n < samples), samples]
        known = [*(f"pass@{k}" for k in ks), "reward", *(f"rewards.{name}" for name in rewards)]
        if self.metric not in known:
            raise ValueError(f"stop.metric: {self.metric} is not measured; there are {', '.join(known)}")
