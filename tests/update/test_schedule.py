"""schedule.py: worked numbers, and transformers' schedulers."""

import math

import pytest
import torch
from tests.update.examples import configuration
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from grpo.config import Config
from grpo.errors import UsageError
from grpo.update.schedule import learning_rate, warmup_of

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


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0, 4, 8, 6.5, 5, 3.5]),  # 2 + 6 (6 - step) / 4 from step 2 on; 2 at step 6
        ("cosine", [0, 4, 8, 5 + 1.5 * math.sqrt(2), 5, 5 - 1.5 * math.sqrt(2)]),
    ],
)
def test_a_schedule_ends_at_the_lowest_learning_rate(schedule: str, expected: list[float]) -> None:
    config = configuration(schedule=schedule, warmup_steps=2, learning_rate=8.0, min_learning_rate=2.0)
    config = config.model_copy(update={"iterations": 6})
    assert [learning_rate(config, step, 0) for step in range(6)] == pytest.approx(expected, rel=1e-14)
    with pytest.raises(
        UsageError, match=f"^update.schedule: {schedule} reaches 2 after iterations: 6; found"
    ):
        learning_rate(config, 6, 0)


def test_a_cosine_to_a_lowest_rate_is_that_of_transformers() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=8.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 3, 20, min_lr=0.5)
    config = configuration(schedule="cosine", warmup_steps=3, learning_rate=8.0, min_learning_rate=0.5)
    config = config.model_copy(update={"iterations": 20})
    for step in range(20):
        assert learning_rate(config, step, 0) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("share", "num_steps", "expected"),
    [(0.0, 6, 0), (0.1, 30, 3), (0.1, 31, 4), (0.5, 5, 3), (0.001, 5, 1), (1 / 3, 3, 1), (0.99, 2, 2)],
)
def test_a_warm_up_as_a_share_is_rounded_up(share: float, num_steps: int, expected: int) -> None:
    assert warmup_of(share, num_steps) == expected


def test_a_warm_up_as_a_share_counts_all_steps_of_the_run() -> None:
    config = configuration(warmup_share=0.25, learning_rate=8.0, epochs=2, steps_per_iteration=2)
    config = config.model_copy(update={"iterations": 4})  # 16 steps, 4 of warm-up
    assert [learning_rate(config, 0, number) for number in range(4)] == [0, 2, 4, 6]
    assert learning_rate(config, 1, 0) == learning_rate(config, 9, 0) == 8  # constant: no end
    longer = config.model_copy(update={"iterations": 8})
    assert learning_rate(longer, 0, 2) == 2
