"""schedule: the learning rate of each optimiser step of a run. Plain numbers in, a number out."""

import math

from grpo.config import Config
from grpo.errors import UsageError


def learning_rate(config: Config, iteration: int, number: int) -> float:
    """Learning rate of optimiser step `number` of an iteration.

    The schedule counts all steps that are configured, taken or not. In warm-up step s gets
    base s / warmup_steps, so step 0 exactly 0. `constant` then stays at base; `linear` and `cosine` begin
    there and are 0 behind the run's last step. The same as get_*_schedule_with_warmup of transformers.
    """
    check_schedule(config, iteration)
    update = config.update
    base, warmup_steps = update.learning_rate, update.warmup_steps
    per_iteration = update.epochs * update.steps_per_iteration
    step, num_steps = iteration * per_iteration + number, config.iterations * per_iteration
    if step < warmup_steps:
        return base * step / warmup_steps
    if update.schedule == "constant":
        return base
    # At least one step is past warm-up here: the divisor is positive.
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    if update.schedule == "linear":
        return base * (1 - progress)
    return base * (1 + math.cos(math.pi * progress)) / 2


def check_schedule(config: Config, iteration: int) -> None:
    """Raise UsageError (exit 2) where the learning rate has reached 0 before `iteration`."""
    schedule = config.update.schedule
    if schedule != "constant" and iteration >= config.iterations:
        raise UsageError(
            f"update.schedule: {schedule} reaches 0 after iterations: {config.iterations};"
            f" found iteration {iteration}; raise `iterations`, or set schedule: constant"
        )
