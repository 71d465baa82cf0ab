"""check: what an update would refuse, as far as it can be known before anything is sampled for it."""

from grpo.artifacts import Run
from grpo.config import Config
from grpo.errors import UsageError


def check_start(run: Run, until: int) -> None:
    """Check what iterations before `until` need; no weight is read.

    Raises UsageError (exit 2) for a schedule that ends before them or targets the model has not, EngineError
    (exit 8) where update.lora has no peft.
    """
    check_schedule(run.config, until - 1)
    if lora := run.config.update.lora:
        from grpo.update.adapter import check_targets, require_peft

        require_peft()
        check_targets(run.start["policy"], lora.targets)


def check_schedule(config: Config, iteration: int) -> None:
    """Raise UsageError (exit 2) where the learning rate has reached 0 before `iteration`."""
    schedule = config.update.schedule
    if schedule != "constant" and iteration >= config.iterations:
        raise UsageError(
            f"update.schedule: {schedule} reaches 0 after iterations: {config.iterations};"
            f" found iteration {iteration}; raise `iterations`, or set schedule: constant"
        )
