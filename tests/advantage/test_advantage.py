"""advantage.sql and its stage, over real tables on disk."""

import math
import operator
import random
import struct
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import restatement
from tests.conftest import Grpo

import grpo as package
from grpo import sql, tables
from grpo.advantage import stage
from grpo.advantage.plan import plan as planned
from grpo.advantage.plan import shipped_sql
from grpo.artifacts import STAGE_OUTPUTS, ActiveRun, Plan, Product, Run, Staging, id_of
from grpo.config import AdvantageConfig, Config
from grpo.console import Console
from grpo.errors import DataError, GrpoError, UsageError
from grpo.pipeline.stages import ADVANTAGE, make

# 0.5 / (sqrt(1 / 3) + 1e-4): rewards 1, 0, 0, 1 deviate by 0.5 each, the squares add up to 1, n - 1 is 3.
UNIT = 0.5 / (math.sqrt(1 / 3) + 1e-4)

Cells = dict[str, tuple[str, float | None, float]]  # name -> (status, value, weight)


@dataclass
class Row:
    """One rollout with its rewards; a bare number stands for one reward `r` of weight 1."""

    rewards: float | Cells
    finish_reason: str = "stop"
    response_tokens: int = 2
    prompt_id: int = 0
    cells: Cells = field(init=False)

    def __post_init__(self) -> None:
        self.cells = self.rewards if isinstance(self.rewards, dict) else {"r": ("ok", self.rewards, 1.0)}


def make_run(root: Path, **advantage: Any) -> ActiveRun:
    config = Config.model_validate(
        {
            "run": "small",
            "model": "unused",
            "prompts": {"source": "unused"},
            "score": {"rewards": [{"function": "exact_answer"}]},
            "advantage": advantage,
        }
    )
    return ActiveRun(root, config, root, Console(quiet=True))


def commit(run: Run, output: str, iteration: int | None, parts: list[pa.Table], **manifest: Any) -> None:
    staging = Staging(run, Plan(STAGE_OUTPUTS.get(output, output), 1, output, iteration, {}, {}), 0)
    records = [
        staging.write_table(output, staging.file_name("part", i), part) for i, part in enumerate(parts)
    ]
    ids = {name: id_of(records) for name in manifest.get("ids", [output])}
    staging.commit(Product(ids, records, manifest.get("summary", {})))


def rollouts_table(groups: list[list[Row]]) -> pa.Table:
    rows = [
        {
            "iteration": 0,
            "group_id": group_id,
            "sample_id": sample_id,
            "prompt_id": row.prompt_id,
            "round": 0,
            "prompt": "1+1=",
            "response": "2",
            "prompt_token_ids": [1, 2],
            "response_token_ids": [3] * row.response_tokens,
            "old_logprobs": [-1.0] * row.response_tokens,
            "response_mask": [True] * row.response_tokens,
            "finish_reason": row.finish_reason,
            "response_tokens": row.response_tokens,
            "policy_iteration": 0,
            "temperature": 1.0,
            "seed": 0,
        }
        for group_id, group in enumerate(groups)
        for sample_id, row in enumerate(group)
    ]
    return pa.Table.from_pylist(rows, schema=tables.schema("rollouts"))


def rewards_table(groups: list[list[Row]]) -> pa.Table:
    rows = [
        {
            "iteration": 0,
            "group_id": group_id,
            "sample_id": sample_id,
            "name": name,
            "value": value,
            "weight": weight,
            "status": status,
            "error": None if status in ("ok", "not_applicable") else "failed",
        }
        for group_id, group in enumerate(groups)
        for sample_id, row in enumerate(group)
        for name, (status, value, weight) in row.cells.items()
    ]
    return pa.Table.from_pylist(rows, schema=tables.schema("rewards"))


def write_inputs(run: Run, groups: list[list[Row]], answers: list[str | None] | None = None) -> None:
    weights = {name: w for group in groups for row in group for name, (_, _, w) in row.cells.items()}
    prompts = [
        {"prompt_id": i, "prompt": "1+1=", "messages": None, "answer": answer}
        for i, answer in enumerate(answers or ["2"])
    ]
    commit(run, "prompts", None, [pa.Table.from_pylist(prompts, schema=tables.schema("prompts"))])
    commit(run, "rollouts", 0, [rollouts_table(groups)])
    commit(
        run,
        "rewards",
        0,
        [rewards_table(groups)],
        ids=[f"reward/{name}" for name in weights],
        summary={"failed": 0, "weights": weights},
    )


def compute(run: ActiveRun) -> list[dict[str, Any]]:
    staging = Staging(run, planned(run, 0), 0)
    with stage.open_resource(run, None) as connection:
        make(run, ADVANTAGE, staging, connection)
    found: list[dict[str, Any]] = run.read("advantages", 0).to_pylist()
    return found


def advantages(
    root: Path, groups: list[list[Row]], answers: list[str | None] | None = None, **config: Any
) -> list[dict[str, Any]]:
    run = make_run(root, **config)
    write_inputs(run, groups, answers)
    return compute(run)


def column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def rows_of(*rewards: float) -> list[Row]:
    return [Row(reward) for reward in rewards]


# ---- the formula ----


def test_worked_example(tmp_path: Path) -> None:
    rows = advantages(tmp_path, [rows_of(1, 0, 0, 1)])
    assert column(rows, "advantage") == pytest.approx([UNIT, -UNIT, -UNIT, UNIT], rel=1e-14)
    assert column(rows, "advantage") == pytest.approx([0.865875, -0.865875, -0.865875, 0.865875], abs=5e-7)
    assert column(rows, "reward") == [1, 0, 0, 1]
    assert column(rows, "group_mean") == [0.5] * 4
    assert column(rows, "group_std") == pytest.approx([0.5773502691896258] * 4, rel=1e-14)  # sqrt(1 / 3)
    assert column(rows, "group_size") == [4] * 4
    assert column(rows, "keep") == [True] * 4
    assert column(rows, "reason") == [None] * 4
    keys = [tuple(row[key] for key in tables.KEY) for row in rows]
    assert keys == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3)]


def test_scale_none_only_subtracts_the_mean(tmp_path: Path) -> None:
    rows = advantages(tmp_path, [rows_of(2, 1)], scale="none")
    assert column(rows, "advantage") == [0.5, -0.5]


def test_scale_batch_divides_by_the_deviation_of_the_whole_iteration(tmp_path: Path) -> None:
    # 1, 0, 2, 4 of the two groups: mean 1.75, squares 0.5625 + 3.0625 + 0.0625 + 5.0625 = 8.75, / 3, root.
    # The group of one (100) is no part of it.
    deviation = math.sqrt(8.75 / 3)
    rows = advantages(tmp_path, [rows_of(1, 0), rows_of(2, 4), rows_of(100)], scale="batch")
    expected = [0.5, -0.5, -1.0, 1.0]
    assert column(rows, "advantage")[:4] == pytest.approx([e / (deviation + 1e-4) for e in expected])
    assert column(rows, "advantage")[4] is None
    assert column(rows, "group_std")[:4] == pytest.approx([math.sqrt(0.5)] * 2 + [math.sqrt(2)] * 2)


def test_scale_batch_counts_rollouts_that_are_dropped_afterwards(tmp_path: Path) -> None:
    # 1, 1, 0, 3: mean 1.25, squares 0.0625 + 0.0625 + 1.5625 + 3.0625 = 4.75, / 3, root.
    deviation = math.sqrt(4.75 / 3)
    groups = [rows_of(1, 1), [Row(0), Row(3, finish_reason="length")]]
    rows = advantages(tmp_path, groups, scale="batch", drop_zero_variance=True, truncated="drop")
    assert column(rows, "reason") == ["zero_variance", "zero_variance", None, "truncated"]
    assert column(rows, "advantage")[2] == pytest.approx(-1.5 / (deviation + 1e-4))


def test_epsilon(tmp_path: Path) -> None:
    # 2, 1: deviation sqrt(0.25 + 0.25); 0.5 / (0.7071 + 0.5)
    rows = advantages(tmp_path, [rows_of(2, 1)], epsilon=0.5)
    assert column(rows, "advantage") == pytest.approx(
        [0.5 / (math.sqrt(0.5) + 0.5), -0.5 / (math.sqrt(0.5) + 0.5)]
    )


def test_a_tiny_deviation_is_held_by_epsilon(tmp_path: Path) -> None:
    # 0.5e-9 / (0.707e-9 + 1e-4) = 5e-6, and not 0.7
    rows = advantages(tmp_path, [rows_of(1e-9, 0)])
    assert column(rows, "advantage") == pytest.approx([4.99996e-6, -4.99996e-6], rel=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(tmp_path: Path, scale: str) -> None:
    # 0.3 + 0.3 + 0.3 is 0.8999999999999999, so the mean is not 0.3; 0.1 three times likewise.
    rows = advantages(tmp_path, [rows_of(0.3, 0.3, 0.3), rows_of(0.1, 0.1, 0.1), rows_of(0, 1)], scale=scale)
    assert column(rows, "advantage")[:6] == [0.0] * 6
    assert all(math.copysign(1, value) == 1 for value in column(rows, "advantage")[:6])
    assert column(rows, "group_mean")[:6] == pytest.approx([0.3] * 3 + [0.1] * 3, rel=1e-15)
    assert column(rows, "group_std")[:6] == [0.0] * 6
    assert column(rows, "keep") == [True] * 8


def test_only_equal_rewards_in_the_whole_batch_give_zero(tmp_path: Path) -> None:
    rows = advantages(tmp_path, [rows_of(0.3, 0.3), rows_of(0.7, 0.7)], scale="batch")
    assert column(rows, "advantage") == [0.0] * 4


# ---- what is kept ----


def test_a_group_of_one_is_not_kept(tmp_path: Path) -> None:
    [row] = advantages(tmp_path, [rows_of(1)])
    assert row == {
        "iteration": 0,
        "group_id": 0,
        "sample_id": 0,
        "reward": 1.0,
        "group_mean": 1.0,
        "group_std": None,
        "group_size": 1,
        "advantage": None,
        "keep": False,
        "reason": "group_too_small",
    }


def test_drop_zero_variance(tmp_path: Path) -> None:
    rows = advantages(tmp_path, [rows_of(0.3, 0.3), rows_of(1, 0)], drop_zero_variance=True)
    assert column(rows, "reason") == ["zero_variance", "zero_variance", None, None]
    assert column(rows, "keep") == [False, False, True, True]
    assert column(rows, "advantage")[:2] == [None, None]


def test_a_truncated_rollout_is_dropped_but_counts_in_its_group(tmp_path: Path) -> None:
    groups = [[Row(1), Row(0), Row(0, finish_reason="length"), Row(1)]]
    kept = advantages(tmp_path / "keep", groups)
    dropped = advantages(tmp_path / "drop", groups, truncated="drop")
    assert column(kept, "advantage") == pytest.approx([UNIT, -UNIT, -UNIT, UNIT])
    assert column(dropped, "advantage")[2] is None
    assert column(dropped, "reason") == [None, None, "truncated", None]
    assert [column(dropped, "advantage")[i] for i in (0, 1, 3)] == pytest.approx([UNIT, -UNIT, UNIT])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row(9, response_tokens=0), "empty"),
        (Row(9, response_tokens=0, finish_reason="abort"), "empty"),
        (Row(9, finish_reason="abort"), "unscored"),
        (Row({"r": ("error", None, 1.0)}), "unscored"),
        (Row({"r": ("timeout", None, 1.0)}), "unscored"),
        (Row({"r": ("nonfinite", None, 1.0)}), "unscored"),
        (Row({"r": ("not_applicable", None, 1.0)}), "unscored"),
        (Row({}), "unscored"),
    ],
)
def test_a_rollout_that_does_not_count_changes_nothing_for_its_group(
    tmp_path: Path, row: Row, reason: str
) -> None:
    rows = advantages(tmp_path, [[Row(1), Row(0), row, Row(0), Row(1)]])
    assert column(rows, "reason") == [None, None, reason, None, None]
    assert rows[2]["advantage"] is None
    assert [rows[i]["advantage"] for i in (0, 1, 3, 4)] == pytest.approx([UNIT, -UNIT, -UNIT, UNIT])
    assert column(rows, "group_size") == [4] * 5
    assert column(rows, "group_mean") == [0.5] * 5


def test_a_lone_end_of_sequence_counts(tmp_path: Path) -> None:
    rows = advantages(tmp_path, [[Row(1, response_tokens=1), Row(0)]], scale="none")
    assert column(rows, "advantage") == [0.5, -0.5]


def test_a_group_left_with_one_scored_rollout_is_too_small(tmp_path: Path) -> None:
    rows = advantages(tmp_path, [[Row(1), Row(0, finish_reason="abort")]])
    assert column(rows, "reason") == ["group_too_small", "unscored"]
    assert column(rows, "group_size") == [1, 1]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_batch_in_which_nothing_is_kept(tmp_path: Path, scale: str) -> None:
    rows = advantages(tmp_path, [rows_of(1), [Row({}), Row(3, response_tokens=0)]], scale=scale)
    assert column(rows, "reason") == ["group_too_small", "unscored", "empty"]
    assert column(rows, "advantage") == [None] * 3
    assert column(rows, "group_size") == [1, 0, 0]


@pytest.mark.parametrize("other", [Row(5, finish_reason="abort"), Row(5, response_tokens=0), Row({})])
def test_the_mean_of_a_constant_group_is_that_of_its_scored_rollouts_in_every_row(
    tmp_path: Path, other: Row
) -> None:
    rows = advantages(tmp_path, [[Row(0.3), other, Row(0.3), Row(0.3)]])
    assert column(rows, "group_mean") == pytest.approx([0.3] * 4, rel=1e-15)
    assert column(rows, "group_std") == [0.0] * 4


# ---- several rewards ----


def test_one_weighted_reward(tmp_path: Path) -> None:
    rows = advantages(tmp_path, [[Row({"a": ("ok", 1.0, 3.0)}), Row({"a": ("ok", 0.5, 3.0)})]], scale="none")
    assert column(rows, "reward") == [3.0, 1.5]
    assert column(rows, "advantage") == [0.75, -0.75]


def test_two_weighted_rewards(tmp_path: Path) -> None:
    groups = [
        [
            Row({"a": ("ok", 1.0, 2.0), "b": ("ok", 4.0, -0.5)}),  # 2 - 2 = 0
            Row({"a": ("ok", 3.0, 2.0), "b": ("ok", 2.0, -0.5)}),  # 6 - 1 = 5
        ]
    ]
    rows = advantages(tmp_path, groups, scale="none")
    assert column(rows, "reward") == [0.0, 5.0]
    assert column(rows, "advantage") == [-2.5, 2.5]


def test_three_rewards_are_added_with_what_rounding_would_lose(tmp_path: Path) -> None:
    # 1 + 1e16 - 1e16: plainly from left to right it is 0, because 1 + 1e16 rounds to 1e16. The rows are
    # written in another order than that of the names, by which they are added.
    cells: Cells = {"c": ("ok", -1e16, 1.0), "b": ("ok", 1e16, 1.0), "a": ("ok", 1.0, 1.0)}
    swapped: Cells = {"b": ("ok", -1e16, 1.0), "c": ("ok", 1.0, 1.0), "a": ("ok", 1e16, 1.0)}
    rows = advantages(tmp_path, [[Row(cells), Row(swapped)]], scale="none")
    assert column(rows, "reward") == [1.0, 1.0]
    assert column(rows, "advantage") == [0.0, 0.0]


def test_rounding_of_a_sum_is_no_difference(tmp_path: Path) -> None:
    """0.1 + 0.2 + 0.3 is 0.6000000000000001 in floats, 0.3 + 0.2 + 0.1 is 0.6: the same reward."""
    orders = ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1), (0.2, 0.3, 0.1))
    group = [Row({name: ("ok", v, 1.0) for name, v in zip("abc", values, strict=True)}) for values in orders]
    rows = advantages(tmp_path, [group], epsilon=0.0)
    assert column(rows, "reward") == [0.6, 0.6, 0.6]
    assert column(rows, "advantage") == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("names", [2, 3, 4])
def test_one_failed_reward_makes_the_rollout_unscored(tmp_path: Path, names: int) -> None:
    good: Cells = {f"r{i}": ("ok", 1.0, 1.0) for i in range(names)}
    rows = advantages(tmp_path, [[Row(good), Row({**good, "r0": ("timeout", None, 1.0)}), Row(good)]])
    assert column(rows, "reason") == [None, "unscored", None]
    assert column(rows, "reward") == [names, None, names]


@pytest.mark.parametrize("names", [2, 3])
def test_a_reward_that_does_not_apply_does_not_count(tmp_path: Path, names: int) -> None:
    good: Cells = {f"r{i}": ("ok", 2.0, 1.0) for i in range(names)}
    rows = advantages(
        tmp_path, [[Row(good), Row({**good, "r0": ("not_applicable", None, 1.0)})]], scale="none"
    )
    assert column(rows, "reward") == [2.0 * names, 2.0 * names - 2]
    assert column(rows, "advantage") == [1.0, -1.0]


def test_weight_zero_is_ignored_whatever_its_status(tmp_path: Path) -> None:
    groups = [
        [
            Row({"r": ("ok", 1.0, 1.0), "looked_at": ("ok", 1e300, 0.0)}),
            Row({"r": ("ok", 0.0, 1.0), "looked_at": ("error", None, 0.0)}),
        ],
        [Row({"r": ("not_applicable", None, 1.0), "looked_at": ("ok", 1.0, 0.0)}), Row(1), Row(0)],
    ]
    rows = advantages(tmp_path, groups, scale="none")
    assert column(rows, "reward") == [1.0, 0.0, None, 1.0, 0.0]
    assert column(rows, "advantage") == [0.5, -0.5, None, 0.5, -0.5]
    assert rows[2]["reason"] == "unscored"


# ---- where ----


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("reward >= 1", [1, 0, 0, 1]),
        ("rewards['length'] < 15", [1, 1, 0, 0]),
        ("advantage < 0 or sample_id = 0", [1, 1, 1, 0]),
        ("answer = 'four'", [0, 0, 0, 1]),
        ("answer is null or answer <> 'four'", [1, 1, 1, 0]),
        ("null", [0, 0, 0, 0]),
        ("true", [1, 1, 1, 1]),
    ],
)
def test_where(tmp_path: Path, where: str, kept: list[int]) -> None:
    groups = [
        [
            Row({"r": ("ok", float(reward), 1.0), "length": ("ok", length, 0.0)}, prompt_id=i)
            for i, (reward, length) in enumerate([(1, 10.0), (0, 11.0), (0, 15.0), (1, 20.0)])
        ]
    ]
    rows = advantages(tmp_path, groups, ["two", None, "three", "four"], where=where)
    assert column(rows, "keep") == [bool(k) for k in kept]
    assert column(rows, "reason") == [None if k else "filtered" for k in kept]
    # Known before anything is dropped: those that stay have the advantages of the whole group.
    whole = [UNIT, -UNIT, -UNIT, UNIT]
    expected = [value if k else None for value, k in zip(whole, kept, strict=True)]
    assert [x is None for x in column(rows, "advantage")] == [x is None for x in expected]
    assert [x for x in column(rows, "advantage") if x is not None] == pytest.approx(
        [x for x in expected if x is not None]
    )


def test_where_leaves_other_reasons_as_they_are(tmp_path: Path) -> None:
    rows = advantages(tmp_path, [rows_of(1), rows_of(1, 0)], where="false")
    assert column(rows, "reason") == ["group_too_small", "filtered", "filtered"]


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("reward", "DOUBLE"),
        ("response_tokens", "INTEGER"),
        ("'true'", "VARCHAR"),
        ("case when reward > 0 then 1 else 0 end", "INTEGER"),
        ("rewards", "MAP(VARCHAR, DOUBLE)"),
    ],
)
def test_where_is_true_or_false(tmp_path: Path, where: str, kind: str) -> None:
    with pytest.raises(UsageError) as caught:
        advantages(tmp_path, [rows_of(1, 0)], where=where)
    expected = "expected a condition, true or false, such as reward > 0"
    assert str(caught.value) == f"advantage.where: query: is of type {kind}; {expected}"
    run = make_run(tmp_path / "before", where=where)
    with pytest.raises(UsageError, match=r"^advantage\.where: query: is of type "):  # before anything is made
        stage.check(run, 1, None)


def test_where_that_is_no_sql(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'^advantage.where: query: .*"rewrad" not found') as caught:
        advantages(tmp_path, [rows_of(1, 0)], where="rewrad > 0")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match=r"^advantage.where: query: 2 statements, divided by `;`; write one"):
        advantages(tmp_path / "two", [rows_of(1, 0)], where="true; select 0 as iteration")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("where=rewrad > 0", 'advantage.where: query: Binder Error: Referenced column "rewrad" not found'),
        (
            "where=true); select (1",
            'advantage.where: query: syntax error at or near ")"; expected one condition',
        ),
        (
            "sql=my.sql",
            "advantage.sql: my.sql: returns no column advantage; it must return iteration, group_id, sample",
        ),
    ],
)
def test_a_run_refuses_sql_before_it_samples(project: Path, grpo: Grpo, override: str, message: str) -> None:
    Path("my.sql").write_text("select iteration, group_id, sample_id, reward from scored")
    code, _, err = grpo("run", "--set", f"advantage.{override}")
    assert code == 2, err
    assert err.splitlines()[-1].startswith(f"error: {message}")
    assert not list(Path("artifacts/tiny").glob("iteration=*"))


# ---- a user's own estimator ----


def own(root: Path, query: str, groups: list[list[Row]], **config: Any) -> list[dict[str, Any]]:
    root.mkdir(exist_ok=True)
    (root / "my.sql").write_text(query)
    return advantages(root, groups, sql="my.sql", **config)


def test_own_sql_replaces_the_advantage_and_nothing_else(tmp_path: Path) -> None:
    query = "select iteration, group_id, sample_id, 10 * value as advantage from rewards"
    rows = own(tmp_path, query, [rows_of(1, 0, 0, 1), rows_of(7)])
    assert column(rows, "advantage") == [10.0, 0.0, 0.0, 10.0, None]
    assert column(rows, "reason") == [None] * 4 + ["group_too_small"]
    assert column(rows, "group_mean") == [0.5] * 4 + [7.0]


def test_own_sql_sees_what_the_built_in_one_gave(tmp_path: Path) -> None:
    query = "select iteration, group_id, sample_id, 2 * advantage as advantage from samples"
    rows = own(tmp_path, query, [rows_of(2, 1)], scale="none")
    assert column(rows, "advantage") == [1.0, -1.0]  # 2 * +-0.5


@pytest.mark.parametrize(("value", "name"), [(1e308, "reward"), (1e160, "group_std")])
def test_a_sum_or_deviation_beyond_float64_is_an_error(tmp_path: Path, value: float, name: str) -> None:
    # 10 * 1e308 overflows; so does the square of 1e160 / 2
    weight = 10.0 if name == "reward" else 1.0
    groups = [[Row({"r": ("ok", reward, weight)}) for reward in (value, 0.0)]]
    with pytest.raises(
        DataError, match=rf"^advantage: {name} of rollout .* \(0, 0, 0\) is not finite"
    ) as caught:
        advantages(tmp_path, groups)
    assert caught.value.exit_code == 3


def test_own_sql_may_leave_rows_out(tmp_path: Path) -> None:
    query = "select iteration, group_id, sample_id, value as advantage from rewards where sample_id <> 1"
    rows = own(tmp_path, query, [rows_of(1, 0, 5)])
    assert column(rows, "keep") == [True, False, True]
    assert column(rows, "reason") == [None, "filtered", None]
    assert column(rows, "advantage") == [1.0, None, 5.0]


def test_own_sql_null_means_not_kept(tmp_path: Path) -> None:
    query = "select iteration, group_id, sample_id, nullif(value, 0) as advantage from rewards"
    rows = own(tmp_path, query, [rows_of(1, 0)])
    assert column(rows, "advantage") == [1.0, None]
    assert column(rows, "reason") == [None, "filtered"]


def test_own_sql_and_where(tmp_path: Path) -> None:
    query = "select iteration, group_id, sample_id, value - 0.5 as advantage from rewards"
    rows = own(tmp_path, query, [rows_of(1, 0)], where="advantage > 0")
    assert column(rows, "advantage") == [0.5, None]


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (
            "select iteration, group_id, sample_id, 1 as advantage from rewards, (values (1), (2))",
            DataError,
            r"^advantage\.sql: my\.sql: returns a rollout twice; it must return each \(iteration, group",
        ),
        (
            "select iteration, group_id, sample_id, 'nan'::double as advantage from rewards",
            DataError,
            r"^advantage\.sql: my\.sql: returns an advantage that is nan or infinite$",
        ),
        (
            "select iteration, group_id, sample_id, '-inf'::double as advantage from rewards",
            DataError,
            r"^advantage\.sql: my\.sql: returns an advantage that is nan or infinite$",
        ),
        (
            "select iteration, group_id, sample_id, value from rewards",
            UsageError,
            r"^advantage\.sql: my\.sql: returns no column advantage; it must return iteration, gr",
        ),
        ("select group_id, value as advantage from rewards", UsageError, "returns no column iteration"),
        *(
            (f"select {keys}, value as advantage from rewards", DataError, f"{wrong}, which is no rollout of")
            for keys, wrong in (
                ("iteration + 1 as iteration, group_id, sample_id", r"\(1, 0, 0\)"),
                ("iteration, group_id + 7 as group_id, sample_id", r"\(0, 7, 0\)"),
                ("iteration, group_id, sample_id - 1 as sample_id", r"\(0, 0, -1\)"),
                ("iteration, group_id, nullif(sample_id, 1) as sample_id", r"\(0, 0, None\)"),
            )
        ),
        (
            "select iteration::varchar as iteration, group_id, sample_id, value as advantage from rewards",
            DataError,
            "must be integers and advantage a number: iteration is of type string$",
        ),
        ("select * from nothing", UsageError, "^advantage.sql: my.sql: query: .*nothing does not exist"),
    ],
)
def test_own_sql_errors(tmp_path: Path, query: str, error: type[GrpoError], message: str) -> None:
    with pytest.raises(error, match=message):
        own(tmp_path, query, [rows_of(1, 0)])


@pytest.mark.parametrize("advantage", ["'high'", "[1.0]", "'1.5'", "value > 0", "current_date"])
def test_own_sql_of_another_type(tmp_path: Path, advantage: str) -> None:
    query = f"select iteration, group_id, sample_id, {advantage} as advantage from rewards"
    message = (
        r"^advantage\.sql: my\.sql: iteration, group_id, sample_id must be integers and advantage a number: "
    )
    with pytest.raises(DataError, match=message):
        own(tmp_path, query, [rows_of(1, 0)])


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("true", ""),
        ("sample_id <> 1", "advantage.sql returned 3 of 4 rollouts; the others are not trained on\n"),
        ("group_id = 0 and sample_id = 0", "advantage.sql returned 1 of 4 rollouts; the others are not t"),
        ("group_id = 0", ""),  # the other rollout is alone in its group, and not trained on anyway
    ],
)
def test_rollouts_that_own_sql_leaves_out_are_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], condition: str, said: str
) -> None:
    query = f"select iteration, group_id, sample_id, value as advantage from rewards where {condition}"
    (tmp_path / "my.sql").write_text(query)
    run = make_run(tmp_path, sql="my.sql")
    run.console = Console()
    write_inputs(run, [rows_of(1, 0, 5), rows_of(7)])
    compute(run)
    err = capfd.readouterr().err
    assert err.startswith(said) if said else not err


def test_own_sql_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^advantage\.sql: .*my\.sql: no such file$"):
        advantages(tmp_path, [rows_of(1, 0)], sql="my.sql")


# ---- the same to the last bit ----


def many_groups(seed: int, num_groups: int, num_rewards: int) -> list[list[Row]]:
    draw = random.Random(seed)
    weights = [draw.uniform(-2, 2) for _ in range(num_rewards)]
    return [
        [
            Row({f"r{i}": ("ok", draw.gauss(0, 10 ** draw.uniform(-3, 3)), w) for i, w in enumerate(weights)})
            for _ in range(draw.randint(2, 9))
        ]
        for _ in range(num_groups)
    ]


def shards(table: pa.Table, cuts: list[int]) -> list[pa.Table]:
    edges = [0, *sorted(cuts), len(table)]
    return [table.slice(a, b - a) for a, b in pairwise(edges)]


@pytest.mark.parametrize(("num_rewards", "scale"), [(2, "group"), (4, "batch")])
def test_bit_identical_for_any_threads_and_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rewards: int, scale: str
) -> None:
    groups = many_groups(seed=1, num_groups=500, num_rewards=num_rewards)
    rollouts, rewards = rollouts_table(groups), rewards_table(groups)
    by_name = rewards.sort_by(
        [("name", "descending"), ("group_id", "ascending"), ("sample_id", "descending")]
    )
    layouts: dict[str, tuple[list[pa.Table], list[pa.Table]]] = {
        "one file": ([rollouts], [rewards]),
        "many": (
            shards(rollouts, list(range(100, len(rollouts), 217)))[::-1],
            shards(rewards, list(range(50, len(rewards), 593)))[::-1],
        ),
        "by name": (shards(rollouts, [777]), shards(by_name, list(range(0, len(by_name), 777)))),
    }
    weights = {name: weight for name, (_, _, weight) in groups[0][0].cells.items()}
    connect = duckdb.connect
    found: dict[tuple[int, str], list[list[Any]]] = {}
    for threads in (1, 2):
        for name, (rollout_parts, reward_parts) in layouts.items():
            run = make_run(tmp_path / f"{threads} {name}", scale=scale)
            commit(run, "rollouts", 0, rollout_parts)
            summary = {"failed": 0, "weights": weights}
            commit(run, "rewards", 0, reward_parts, ids=[f"reward/{n}" for n in weights], summary=summary)

            def with_threads(
                path: str, config: dict[str, Any], threads: int = threads
            ) -> duckdb.DuckDBPyConnection:
                return connect(path, config={**config, "threads": threads})

            monkeypatch.setattr(duckdb, "connect", with_threads)
            found[threads, name] = bits(compute(run))
    monkeypatch.setattr(stage, "BLOCK_ROWS", 100)  # how many rows are worked on at a time
    assert len(run.require("advantages", 0, "").files) == 1
    found[0, "small blocks"] = bits(compute(run))
    assert len(run.require("advantages", 0, "").files) > 10
    first = found[1, "one file"]
    assert len(first) == len(rollouts)
    assert {key: rows == first for key, rows in found.items()} == dict.fromkeys(found, True)


def bits(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[struct.pack("d", v) if isinstance(v, float) else v for v in row.values()] for row in rows]


# ---- against the plain restatement ----

# Magnitudes from 1e-6 to 10: terms this near to each other lose no bit in the compensated sum, which is then
# the restatement's, exactly. One of 1e-45 beside 0.7 + 0.3 decides how the last bit is rounded, and no more.
magnitudes = st.floats(1e-6, 10)
values = st.sampled_from([0.0, 1.0, 0.3, 0.1, -2.5]) | magnitudes | magnitudes.map(operator.neg)
statuses = st.sampled_from(["ok"] * 12 + ["not_applicable", "error", "timeout", "nonfinite"])


@st.composite
def batches(draw: st.DrawFn) -> list[list[Row]]:
    names = [f"r{i}" for i in range(draw(st.integers(1, 4)))]
    weights = {name: draw(st.sampled_from([1.0, 0.7, -0.3, 0.0])) for name in names}

    def one_row() -> Row:
        cells: Cells = {}
        for name in names:
            status = draw(statuses)
            cells[name] = (status, draw(values) if status == "ok" else None, weights[name])
        finish = draw(st.sampled_from(["stop"] * 6 + ["length", "abort"]))
        return Row(cells, finish, draw(st.sampled_from([2, 2, 2, 1, 0])))

    return [[one_row() for _ in range(draw(st.integers(1, 6)))] for _ in range(draw(st.integers(1, 4)))]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=batches(),
    scale=st.sampled_from(["group", "batch", "none"]),
    drop_zero_variance=st.booleans(),
    truncated=st.sampled_from(["keep", "drop"]),
)
def test_equals_the_restatement(
    tmp_path_factory: pytest.TempPathFactory,
    groups: list[list[Row]],
    scale: str,
    drop_zero_variance: bool,
    truncated: str,
) -> None:
    config: dict[str, Any] = {
        "scale": scale,
        "drop_zero_variance": drop_zero_variance,
        "truncated": truncated,
    }
    found = advantages(tmp_path_factory.mktemp("property"), groups, **config)
    plain = [
        restatement.Scored(
            group_id,
            sample_id,
            [restatement.Reward(name, w, status, value) for name, (status, value, w) in row.cells.items()],
            row.response_tokens,
            row.finish_reason,
        )
        for group_id, group in enumerate(groups)
        for sample_id, row in enumerate(group)
    ]
    expected = restatement.advantages(
        plain, scale, drop_zero_variance=drop_zero_variance, drop_truncated=truncated == "drop"
    )
    close = partial(pytest.approx, rel=1e-10, abs=1e-10)
    for row, want in zip(found, expected, strict=True):
        assert row["reason"] == want.reason
        assert row["keep"] == want.keep
        assert row["group_size"] == want.group_size
        assert row["reward"] == want.reward
        if want.advantage is None or want.group_std == 0:
            assert row["advantage"] == want.advantage
        else:
            assert row["advantage"] == close(want.advantage)
        for name in ("group_mean", "group_std"):
            value = getattr(want, name)
            assert row[name] == (None if value is None else close(value)), name


# ---- the view `samples` ----


def test_samples_has_exactly_one_row_per_rollout(tmp_path: Path) -> None:
    groups = [
        [Row({"a": ("ok", 1.0, 1.0), "b": ("ok", 5.0, 0.0)}), Row({"a": ("ok", 0.0, 1.0)}), Row({})],
        [Row({"a": ("error", None, 1.0)}, prompt_id=1), Row(1, prompt_id=99)],
    ]
    run = make_run(tmp_path)
    write_inputs(run, groups, ["2", None])
    statement = "select * from samples order by group_id, sample_id"
    with sql.connect([run]) as connection:
        before = sql.query(connection, statement).to_pylist()
    compute(run)
    read = [
        {
            "iteration": 0,
            "group_id": 0,
            "sample_id": 0,
            "update_iteration": n,
            "step": 0,
            "mismatch": float(n),
        }
        for n in (0, 1)  # two updates read the same rollout
    ]
    logprobs = pa.Table.from_pylist(read, schema=tables.schema("logprobs"))
    staging = Staging(run, Plan("update", 1, "update", 0, {}, {}), 0)
    staging.commit(Product({}, [staging.write_table("logprobs", "logprobs-0.parquet", logprobs)], {}))
    with sql.connect([run]) as connection:
        after = sql.query(connection, statement).to_pylist()

    keys = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for rows in (before, after):
        assert [(row["group_id"], row["sample_id"]) for row in rows] == keys
        assert column(rows, "answer") == ["2", "2", "2", None, None]
        assert [row["rewards"] and dict(row["rewards"]) for row in rows] == [
            {"a": 1.0, "b": 5.0},
            {"a": 0.0},
            None,
            {"a": None},
            {"r": 1.0},
        ]
    assert column(before, "keep") == [None] * 5
    assert column(after, "keep") == [True, True, False, False, False]
    assert column(after, "mismatch") == [0.0, None, None, None, None]
    assert column(after, "run") == ["small"] * 5


def test_a_change_of_the_shipped_formula_is_a_change(
    finished: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "advantage/advantage.sql"
    shipped = shipped_sql(AdvantageConfig())
    others = ["batch_deviation.sql", "estimators/group.sql"]
    views = {"sql/macros.sql", "sql/views/scored.sql"}
    assert set(shipped) == {name, *(f"advantage/{other}" for other in others), *views}
    assert shipped[name] == sha256((Path(package.__file__).parent / name).read_bytes()).hexdigest()
    changed = {**shipped, name: "0" * 64}
    monkeypatch.setattr("grpo.advantage.plan.shipped_sql", lambda config: changed)
    code, _, err = grpo("advantage", "--iteration", "0")
    assert code == 4
    assert err.endswith(f"advantages: changed ({name}: its file changed); --force reruns it\n")
