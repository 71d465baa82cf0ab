"""schedule.py: worked numbers, and transformers' schedulers."""

import math

import pytest
import torch
from tests.update.examples import configuration
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from grpo.config import Config
from grpo.errors import UsageError
from grpo.update.schedule import learning_rate

THEIRS = {
    "constant": lambda optimizer, warmup, num_steps: get_constant_schedule_with_warmup(optimizer, warmup),
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}


def config_of(schedule: str, num_steps: int, warmup_steps: int, base: float = 8.0) -> Config:
    """One optimiser step an iteration. Warm-up may be longer than the run, which a configuration refuses."""
    config = configuration(schedule=schedule, warmup_steps=warmup_steps, learning_rate=base)
    return config.model_copy(update={"iterations": num_steps})


def whole_run(schedule: str, num_steps: int, warmup_steps: int, base: float = 8.0) -> list[float]:
    config = config_of(schedule, num_steps, warmup_steps, base)
    return [learning_rate(config, step, 0) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, [8, 8, 8, 8, 8, 8]),
        ("constant", 4, [0, 2, 4, 6, 8, 8]),  # 8 * step / 4, and 8 from step 4 on
        (
            "linear",
            2,
            [0, 4, 8, 6, 4, 2],
        ),  # 8 * (6 - step) / 4 from step 2 on; 0 at step 6, which is not taken
        ("linear", 0, [8, 8 * 5 / 6, 8 * 4 / 6, 4, 8 * 2 / 6, 8 / 6]),
        # 4 (1 + cos(pi k / 4)) for k = 0 .. 3 from step 2 on
        ("cosine", 2, [0, 4, 8, 4 + 2 * math.sqrt(2), 4, 4 - 2 * math.sqrt(2)]),
        ("cosine", 5, [0, 1.6, 3.2, 4.8, 6.4, 8]),
        ("linear", 6, [0, 8 / 6, 16 / 6, 4, 32 / 6, 40 / 6]),  # never at 8
        ("linear", 8, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_learning_rate(schedule: str, warmup_steps: int, expected: list[float]) -> None:
    assert whole_run(schedule, 6, warmup_steps) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("schedule", THEIRS)
def test_a_run_of_one_step_has_the_learning_rate_itself(schedule: str) -> None:
    assert whole_run(schedule, 1, 0) == [8]
    assert whole_run(schedule, 1, 1) == [0]


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (7, 0), (7, 1), (20, 6), (7, 7), (5, 9)])
def test_the_same_as_transformers(schedule: str, num_steps: int, warmup_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=5e-7)
    scheduler = THEIRS[schedule](optimizer, warmup_steps, num_steps)
    theirs = []
    for _ in range(num_steps):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert whole_run(schedule, num_steps, warmup_steps, 5e-7) == pytest.approx(theirs, rel=1e-12, abs=1e-21)


def test_steps_of_an_iteration_are_counted_by_epochs() -> None:
    config = configuration(schedule="linear", learning_rate=8.0, epochs=2, steps_per_iteration=2)
    config = config.model_copy(update={"iterations": 2})
    # 8 (8 - s) / 8 with s = 4 iteration + number
    rates = [learning_rate(config, iteration, number) for iteration in range(2) for number in range(4)]
    assert rates == [8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("schedule", THEIRS)
def test_after_the_last_iteration_a_constant_rate_stays_and_others_are_refused(schedule: str) -> None:
    config = config_of(schedule, 6, 0)
    if schedule == "constant":
        assert learning_rate(config, 6, 0) == 8
        return
    with pytest.raises(UsageError, match=r"found iteration 6; raise `iterations`, or set schedule: con"):
        learning_rate(config, 6, 0)
