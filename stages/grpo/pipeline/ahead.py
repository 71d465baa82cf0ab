"""ahead: what a run would fail with whatever its prompts and its model are: found before either is read."""

from grpo.artifacts import ActiveRun
from grpo.errors import UsageError
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.vllm_settings import check_version
from grpo.pipeline.stages import ADVANTAGE, GENERATE
from grpo.prompts import table as prompts
from grpo.score.scorers import check_alone
from grpo.update.adapter import require_peft
from grpo.update.own_surrogate import surrogate_of
from grpo.update.world import check_learner


def check_ahead(run: ActiveRun) -> None:
    """Raise now what is wrong with engine, templates, SQL, rewards, learner, surrogate or adapter.

    Writes nothing.
    """
    usable_engine(run)
    for output in (prompts.OUTPUT, *([prompts.HELD_OUT] if run.config.evaluate is not None else [])):
        prompts.check_template(run, output)
    for stage in (GENERATE, ADVANTAGE):  # SQL of the user's
        stage.load().check(run, run.config.iterations, None)
    check_alone(run)
    check_learner(run.config)
    surrogate_of(run)
    if run.config.update.lora is not None:
        require_peft()


def usable_engine(run: ActiveRun) -> tuple[str, str]:
    """The engine and why. Raises UsageError (exit 2) without it, and for what it has not."""
    name, why = choose_engine(run.config.generate.engine)
    if name == "vllm":
        check_version()
    elif cut := run.config.generate.truncation():
        raise UsageError(f"generate.{cut}: needs engine: vllm, but {name} is taken ({why})")
    return name, why
