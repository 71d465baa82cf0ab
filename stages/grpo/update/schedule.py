"""schedule: the learning rate of each optimiser step of a run. Plain numbers in, a number out."""

import math

from grpo.config import Config
from grpo.errors import UsageError


def learning_rate(config: Config, iteration: int, number: int) -> float:
    """Learning rate of optimiser step `number` of an iteration.

    The schedule counts all steps that are configured, taken or not. In warm-up step s gets
    base s / warmup_steps, so step 0 exactly 0. `constant` then stays at base; `linear` and `cosine` begin
    there and are at min_learning_rate behind the run's last step. The same as get_*_schedule_with_warmup and
    get_cosine_with_min_lr_schedule_with_warmup of transformers.
    """
    check_schedule(config, iteration)
    update = config.update
    base, lowest = update.learning_rate, update.min_learning_rate
    per_iteration = update.epochs * update.steps_per_iteration
    step, num_steps = iteration * per_iteration + number, config.iterations * per_iteration
    warmup_steps = update.warmup_steps or warmup_of(update.warmup_share, num_steps)
    if step < warmup_steps:
        return base * step / warmup_steps
    if update.schedule == "constant":
        return base
    # At least one step is past warm-up here: the divisor is positive.
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    if update.schedule == "linear":
        return lowest + (base - lowest) * (1 - progress)
    return lowest + (base - lowest) * (1 + math.cos(math.pi * progress)) / 2


def warmup_of(share: float, num_steps: int) -> int:
    """Steps of a warm-up that is a share of the run, rounded up: 0.1 of 30 is 3, though 0.1 * 30 is more."""
    return math.ceil(round(share * num_steps, 9))


def check_schedule(config: Config, iteration: int) -> None:
    """Raise UsageError (exit 2) where the schedule has ended before `iteration`."""
    update, schedule = config.update, config.update.schedule
    if schedule != "constant" and iteration >= config.iterations:
        raise UsageError(
            f"update.schedule: {schedule} reaches {update.min_learning_rate:g} after iterations:"
            f" {config.iterations}; found iteration {iteration}; raise `iterations`, or set schedule:"
            " constant"
        )
