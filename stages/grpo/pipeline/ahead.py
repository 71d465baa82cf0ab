"""ahead: what a run would fail with whatever its prompts and its model are: found before either is read."""

from grpo.artifacts import ActiveRun
from grpo.errors import UsageError
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.vllm_settings import check_version
from grpo.pipeline.stages import ADVANTAGE, GENERATE
from grpo.score.scorers import check_alone
from grpo.update.adapter import require_peft
from grpo.update.own_surrogate import surrogate_of


def check_ahead(run: ActiveRun) -> None:
    """Raise now what a run of this configuration would begin with: engine, SQL, rewards, surrogate, peft.

    Says what would make it learn nothing. Nothing is written.
    """
    usable_engine(run)
    for stage in (GENERATE, ADVANTAGE):  # SQL of the user's
        stage.load().check(run, run.config.iterations, None)
    check_alone(run)
    surrogate_of(run)
    if run.config.update.lora is not None:
        require_peft()
    for line in without_signal(run):
        run.console.say(line)


def usable_engine(run: ActiveRun) -> tuple[str, str]:
    """The engine and why. Raises EngineError (exit 8) without it, UsageError (exit 2) for what it has not."""
    name, why = choose_engine(run.config.generate.engine)
    if name == "vllm":
        check_version()
    elif cut := run.config.generate.truncation():
        raise UsageError(f"generate.{cut}: needs engine: vllm, but {name} is taken ({why})")
    return name, why


_NEARLY_GREEDY = 0.1  # a temperature: a token of half the likeliest one's probability is drawn once in 1,000


def without_signal(run: ActiveRun) -> list[str]:
    """What of the configuration makes responses or rewards of a group alike, or the step nothing."""
    config, found = run.config, []
    sampled, alike = config.generate, "the responses of a group are nearly the same, and teach nothing"
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
