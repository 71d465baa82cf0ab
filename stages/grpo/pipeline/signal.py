"""signal: what of a configuration makes it learn nothing, whatever is sampled: `run` and `doctor` say it."""

from grpo.config import Config

_NEARLY_GREEDY = 0.1  # a temperature: a token of half the likeliest one's probability is drawn once in 1,000


def without_signal(config: Config) -> list[str]:
    """What of the configuration makes responses or rewards of a group alike, or the step nothing."""
    found, sampled = [], config.generate
    alike = "the responses of a group are nearly the same, and teach nothing"
    weighs = any(reward.weight for reward in config.score.rewards)
    if not config.unrewarded and not weighs and config.advantage.sql is None:
        found.append("score.rewards: every weight is 0: all rewards are equal, so nothing is learned")
    if not config.unrewarded and sampled.temperature < _NEARLY_GREEDY:
        found.append(f"generate.temperature: {sampled.temperature:g} is nearly greedy: {alike}")
    if not config.unrewarded and sampled.top_k == 1:
        found.append(f"generate.top_k: 1 is greedy: {alike}")
    if config.update.learning_rate == 0:
        found.append("update.learning_rate: 0: no step changes the policy")
    return found
