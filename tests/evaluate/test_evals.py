"""The view `evals`: pass@k, its interval and the mean reward, by hand."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.conftest import PIPELINE

from grpo import sql, tables
from grpo.artifacts import ActiveRun
from grpo.config import load
from grpo.console import Console

Value = float | None | str
"""What the reward gave a response; a text: the status of one that has no value."""


@pytest.fixture
def run(tmp_path: Path) -> ActiveRun:
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return ActiveRun(tmp_path, load(tmp_path / "pipeline.yaml"), tmp_path, Console(quiet=True))


def evaluated(run: ActiveRun, prompts: Sequence[Sequence[Value]], more: Sequence[dict[str, Any]] = ()) -> Any:
    """The row of `evals` of responses that pass from 1 on. more: rows of eval_rewards besides."""
    keys = [(group, sample) for group, values in enumerate(prompts) for sample in range(len(values))]
    rollouts = [
        {
            **{"iteration": 7, "group_id": group, "sample_id": sample, "prompt_id": group},
            **{"response_tokens": 2 + sample, "finish_reason": "length" if sample else "stop"},
        }
        for group, sample in keys
    ]
    rewards = [
        {
            **{"iteration": 7, "group_id": group, "sample_id": sample, "name": "right", "weight": 0.5},
            **{"value": None, "status": value},
            **({} if isinstance(value, str) else {"value": value, "status": "ok"}),
        }
        for group, sample in keys
        for value in [prompts[group][sample]]
    ]
    settings = {"iteration": 7, "pass_reward": "right", "pass_threshold": 1.0, "same_prompts": True}
    data = {
        "eval_rollouts": pa.Table.from_pylist(rollouts, schema=tables.schema("eval_rollouts")),
        "eval_rewards": pa.Table.from_pylist([*rewards, *more], schema=tables.schema("eval_rewards")),
        "_eval_settings": pa.Table.from_pylist([settings], schema=sql.SETTINGS),
    }
    with sql.connect([run], 7, ()) as connection:
        for name, table in data.items():
            sql.register(connection, f"_{name}_0", table)
        [row] = sql.query(connection, "select * from evals").to_pylist(maps_as_pydicts="strict")
    return row


def test_two_prompts_of_four_responses(run: ActiveRun) -> None:
    row = evaluated(run, [[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert (row["run"], row["iteration"], row["prompts"], row["samples"], row["unscored"]) == (
        *("tiny", 7, 2, 8),
        0,
    )
    # Of the first prompt c = 2 of n = 4: pass@1 = 2/4, pass@2 = 1 - C(2,2)/C(4,2) = 5/6, pass@4 = 1.
    assert row["pass_at"] == pytest.approx({1: (1 / 2 + 1) / 2, 2: (5 / 6 + 1) / 2, 4: 1.0}, abs=1e-12)
    # pass@1: values 1/2 and 1, variance 1/8; 0.75 x 0.25 x 2 / (1/8) = 3 trials. Wilson of 2.25 in 3:
    # (0.75 + z²/6) / (1 + z²/3) ± z / (1 + z²/3) sqrt(0.1875/3 + z²/36), z² = 3.841459
    # = 0.609626 ± 0.859450 x 0.411348.
    assert row["pass_at_low"][1] == pytest.approx(0.256093, abs=1e-6)
    assert row["pass_at_high"][1] == pytest.approx(0.963159, abs=1e-6)
    # The weighted rewards are half as large: means 1/4 and 1/2, standard deviation 0.176777;
    # 0.375 ± 1.959964 x 0.176777 / sqrt(2) = 0.375 ± 0.244996.
    assert row["reward"] == 0.375
    assert row["reward_low"] == pytest.approx(0.130004, abs=1e-6)
    assert row["reward_high"] == pytest.approx(0.619996, abs=1e-6)
    assert row["rewards"] == {"right": 0.75}  # unweighted
    assert row["response_tokens"] == (2 + 3 + 4 + 5) / 4
    assert row["truncated"] == 6 / 8


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        # Wilson's interval for 20 of 20: 20 / (20 + z²) = 0.838875; for 0 of 20 its mirror image.
        ([[1.0]] * 20, 0.838875, 1.0),
        ([[0.0]] * 20, 0.0, 0.161125),
        # 3 of 4, one response each: as many trials as prompts.
        ([[1.0], [1.0], [1.0], [0.0]], 0.300642, 0.954413),
        # Prompts that are exactly alike: as many trials as responses, 2 of 4.
        ([[1.0, 0.0], [1.0, 0.0]], 0.150039, 0.849961),
        # A single prompt is a single trial, however many its responses: 1/2 of 1,
        # (0.5 + z²/2) / (1 + z²) = 0.5 ± z / (1 + z²) sqrt(1/4 + z²/4) = z / (2 sqrt(1 + z²)).
        ([[1.0, 0.0, 1.0, 0.0]], 0.054621, 0.945379),
    ],
)
def test_the_interval_of_pass_1(run: ActiveRun, values: list[list[Value]], low: float, high: float) -> None:
    row = evaluated(run, values)
    assert row["pass_at_low"][1] == pytest.approx(low, abs=1e-6)
    assert row["pass_at_high"][1] == pytest.approx(high, abs=1e-6)


def test_pass_at_k_is_the_share_of_draws_of_k_responses_with_one_that_passes(run: ActiveRun) -> None:
    values = [[1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 6, [0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [1.0] * 6]
    row = evaluated(run, values)
    assert list(row["pass_at"]) == [1, 2, 4, 6]  # powers of two, and n
    for k, found in row["pass_at"].items():
        draws = [list(combinations(group, k)) for group in values]
        shares = [sum(any(draw) for draw in group) / len(group) for group in draws]
        assert found == pytest.approx(sum(shares) / 4, abs=1e-12)


def test_k_is_a_power_of_two_or_the_number_of_responses(run: ActiveRun) -> None:
    assert list(evaluated(run, [[1.0] * 8])["pass_at"]) == [1, 2, 4, 8]
    assert list(evaluated(run, [[1.0]])["pass_at"]) == [1]
    # Two thousand responses: no factor of the product overflows. c = 1: pass@k = k/n.
    many = evaluated(run, [[1.0] + [0.0] * 1999])["pass_at"]
    assert many[1024] == pytest.approx(1024 / 2000, abs=1e-9)
    assert list(many)[-1] == 2000


def test_what_was_not_scored_counts_neither_as_passed_nor_as_failed(run: ActiveRun) -> None:
    row = evaluated(run, [[1.0, "error", 0.0], [1.0, "not_applicable", "timeout"]])
    assert (row["samples"], row["unscored"]) == (6, 3)
    # Two responses are left of the first prompt and one of the second, which pass@2 leaves out.
    assert row["pass_at"] == {1: 0.75, 2: 1.0}
    assert row["reward"] == (0.25 + 0.5) / 2


def test_nothing_scored(run: ActiveRun) -> None:
    row = evaluated(run, [["error"], ["error"]])
    assert (row["unscored"], row["pass_at"], row["reward"], row["reward_low"]) == (2, None, None, None)
    assert row["rewards"] == {"right": None}
    assert row["prompts"] == 2


def test_one_prompt_has_no_interval_of_the_mean_reward(run: ActiveRun) -> None:
    row = evaluated(run, [[1.0, 0.0]])
    assert (row["reward"], row["reward_low"], row["reward_high"]) == (0.25, None, None)


def test_a_reward_of_weight_0_is_no_part_of_the_sum_and_may_fail(run: ActiveRun) -> None:
    key = {"iteration": 7, "group_id": 0, "name": "b"}
    more = [
        {**key, "sample_id": 0, "value": 8.0, "weight": 0.0, "status": "ok"},
        {**key, "sample_id": 1, "value": None, "weight": 0.0, "status": "error"},
    ]
    row = evaluated(run, [[1.0, 0.0]], more)
    assert (row["reward"], row["rewards"]) == (0.25, {"b": 8.0, "right": 0.5})
    failed = [{**each, "weight": 1.0} for each in more]
    row = evaluated(run, [[1.0, 0.0]], failed)
    assert row["reward"] == 0.5 + 8.0  # the second response has no sum
    assert row["pass_at"] == {1: 0.5, 2: 1.0}  # but it has the reward that says whether it passes
