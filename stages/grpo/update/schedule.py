"""schedule: the learning rate of each optimiser step of a run. Plain numbers in, a number out."""

import math

from grpo.config import Config
from grpo.errors import UsageError


def learning_rate(base: float, schedule: str, step: int, num_steps: int, warmup_steps: int) -> float:
    """Learning rate of optimiser step `step`, counted over the whole run from 0 to num_steps - 1.

    Warm-up: step s < warmup_steps gets base s / warmup_steps, so step 0 gets exactly 0; step warmup_steps is
    the first with base, which without warm-up is step 0. `constant` stays there. `linear` and `cosine` fall
    so as to be 0 at num_steps, a step that is never taken: with n = num_steps - warmup_steps the last step
    gets base / n under `linear`, base (1 - cos(pi / n)) / 2 under `cosine`. A run of warmup_steps or fewer
    never reaches base. The same as get_*_schedule_with_warmup of transformers.
    """
    assert 0 <= step < num_steps, (step, num_steps)
    if step < warmup_steps:
        return base * step / warmup_steps
    # At least one step is past warm-up here, since step < num_steps: the divisor is positive.
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    if schedule == "constant":
        return base
    if schedule == "linear":
        return base * (1 - progress)
    assert schedule == "cosine", schedule
    return base * (1 + math.cos(math.pi * progress)) / 2


def check_schedule(config: Config, iteration: int) -> None:
    """Raise UsageError (exit 2) where the learning rate has reached 0 before `iteration`."""
    schedule = config.update.schedule
    if schedule != "constant" and iteration >= config.iterations:
        raise UsageError(
            f"update.schedule: {schedule} reaches 0 after iterations: {config.iterations};"
            f" found iteration {iteration}; raise `iterations`, or set schedule: constant"
        )
