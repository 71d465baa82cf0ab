"""Equal up to rounding is equal, wherever it is asked: advantages, signal, views, compare."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.advantage.test_advantage import Row, advantages, column, compute, make_run, own, write_inputs
from tests.advantage.test_estimators import ESTIMATORS, settings
from tests.conftest import Grpo

from grpo import sql
from grpo.inspect.compare import rewards as compare

Terms = list[tuple[float, float]]  # (value, weight) of each reward of a rollout
NOISE: dict[str, list[Terms]] = {
    "two rewards": [[(0.1, 1), (0.2, 1)], [(0.3, 1), (0.0, 1)]],
    "three rewards": [
        [(0.1, 1), (0.2, 1), (0.3, 1)],
        [(0.6, 1), (0.0, 1), (0.0, 1)],
        [(0.3, 1), (0.3, 1), (0, 1)],
    ],
    "weights": [[(1, 0.1), (1, 0.2)], [(3, 0.1), (0, 0.2)]],
    "a negative weight": [[(0.3, 1), (0.2, -1)], [(0.1, 1), (0.0, -1)]],
    "negative rewards": [[(-0.1, 1), (-0.2, 1)], [(-0.3, 1), (0.0, 1)]],
    "a reward of weight 0 that differs": [[(0.1, 1), (0.2, 1), (9, 0)], [(0.3, 1), (0.0, 1), (-9, 0)]],
    "large": [[(1e300, 0.1), (1e300, 0.2)], [(3e300, 0.1), (0, 0.2)]],
    "small": [[(1e-300, 0.1), (1e-300, 0.2)], [(3e-300, 0.1), (0, 0.2)]],
    "big terms that cancel": [[(1e9 + 0.3, 1), (1e9, -1)], [(0.3, 1), (0.0, -1)]],
    "large terms that cancel to 0": [[(0.1 * 3, 1e9), (0.3, -1e9)], [(0.0, 1e9), (0.0, -1e9)]],
    "one number with noise": [[(0.1 + 0.2, 1)], [(0.3, 1)]],
    "eight rollouts": [[(0.1, 1), (0.2, 1)], [(0.3, 1), (0.0, 1)]] * 4,
}
DIFFERENT: dict[str, list[Terms]] = {
    "a millionth": [[(1.0, 1)], [(1.000001, 1)]],
    "more than a billionth": [[(1.0, 1)], [(1.0 + 2e-9, 1)]],
    "subnormal": [[(5e-324, 1)], [(1e-323, 1)]],
    "subnormal and 0": [[(5e-324, 1)], [(0.0, 1)]],
    "small": [[(1e-300, 1)], [(2e-300, 1)]],
    "terms that cancel to something": [[(1.0, 1), (1.0, -1)], [(1.001, 1), (1.0, -1)]],
    "beyond the largest double in between": [[(1.7e308, 1), (-1.7e308, 1)], [(1.0, 1), (1e300, 1)]],
}


def rows_of(rollouts: list[Terms]) -> list[Row]:
    return [
        Row({f"r{i}": ("ok", float(v), float(w)) for i, (v, w) in enumerate(terms)}) for terms in rollouts
    ]


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("case", NOISE)
def test_no_signal(tmp_path: Path, case: str, scale: str, epsilon: float) -> None:
    rows = advantages(tmp_path, [rows_of(NOISE[case])], scale=scale, epsilon=epsilon)
    assert column(rows, "advantage") == [0.0] * len(rows)
    assert column(rows, "group_std") == [0.0] * len(rows)
    assert column(rows, "keep") == [True] * len(rows)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_of_no_estimator(tmp_path: Path, name: str) -> None:
    """Beside a group that has signal; reward 1 in two parts, and in one."""
    parts: list[Terms] = [[(1.0, 0.1), (1.0, 0.2), (1.0, 0.7)], [(10.0, 0.1), (0.0, 0.2), (0.0, 0.7)]]
    right: Terms = parts[0]
    wrong: Terms = [(0.0, w) for _, w in parts[0]]
    rows = advantages(tmp_path, [rows_of(parts), rows_of([right, wrong, wrong])], **settings(name))
    assert column(rows, "advantage")[:2] == [0.0, 0.0]
    assert column(rows, "group_std")[:2] == [0.0, 0.0]
    assert 0.0 not in column(rows, "advantage")[2:] or name == "best_of_k"


def test_a_tie_of_the_best_up_to_rounding_is_a_tie(tmp_path: Path) -> None:
    group: list[Terms] = [[(0.1, 1), (0.2, 1)], [(0.3, 1), (0.0, 1)], [(0.0, 1), (0.0, 1)]]
    rows = advantages(tmp_path, [rows_of(group)], estimator="best_of_k")
    assert column(rows, "advantage") == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("case", NOISE)
def test_dropped_as_without_variance(tmp_path: Path, case: str) -> None:
    rows = advantages(tmp_path, [rows_of(NOISE[case])], drop_zero_variance=True)
    assert column(rows, "reason") == ["zero_variance"] * len(rows)
    own_sql = "select iteration, group_id, sample_id, reward as advantage from scored"
    rows = own(tmp_path / "own", own_sql, [rows_of(NOISE[case])], drop_zero_variance=True)
    assert column(rows, "reason") == ["zero_variance"] * len(rows)


@pytest.mark.parametrize(("cases", "signal"), [(NOISE, 0), (DIFFERENT, 1)])
def test_what_dynamic_sampling_counts(tmp_path: Path, cases: dict[str, list[Terms]], signal: int) -> None:
    for number, rollouts in enumerate(cases.values()):
        run = make_run(tmp_path / str(number))
        write_inputs(run, [rows_of(rollouts)])
        with sql.connect([run], 0) as connection:
            sql.create_scored(connection, [w for _, w in rollouts[0]])
            assert sql.rows(connection, "sql/views/signal") == [{"groups_with_signal": signal}]


@pytest.mark.parametrize("case", [case for case in DIFFERENT if "double" not in case])
def test_what_differs_has_signal(tmp_path: Path, case: str) -> None:
    rows = advantages(tmp_path, [rows_of(DIFFERENT[case])], epsilon=0.0)
    assert min(column(rows, "group_std")) > 0
    if "subnormal" in case:  # whose mean is one of the two
        assert max(map(abs, column(rows, "advantage"))) == 1.0
        return
    half = 0.5**0.5  # of two rollouts, whatever their rewards
    expected = [-half, half] if rows[0]["reward"] < rows[1]["reward"] else [half, -half]
    assert column(rows, "advantage") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", NOISE)
def test_views_and_compare(tmp_path: Path, case: str) -> None:
    run = make_run(tmp_path)
    write_inputs(run, [rows_of(NOISE[case])])
    compute(run)
    with sql.connect([run]) as connection:
        query = "select groups_without_signal from iterations"
        assert sql.query(connection, query).to_pylist() == [{"groups_without_signal": 1.0}]
    found = compare.describe(run, "reward", "r0", "all", 1)
    assert found["overall"]["signal_in_both"] + found["overall"]["signal_lost"] == 0


REWARDS = '''\
"""a + b is c, but for rounding; prompts whose number is even have signal."""


def signal(prompts):
    return [int(prompt[0]) % 2 == 0 for prompt in prompts]


def a(completions, prompts, **columns):
    return [float(i % 2) if has else (0.1 if i % 2 else 0.3) for i, has in enumerate(signal(prompts))]


def b(completions, prompts, **columns):
    return [0.0 if has else (0.2 if i % 2 else 0.0) for i, has in enumerate(signal(prompts))]


def c(completions, prompts, **columns):
    return [float(i % 2) if has else 0.3 for i, has in enumerate(signal(prompts))]
'''


def test_the_same_update_as_with_one_number(project: Path, grpo: Grpo) -> None:
    Path("noise.py").write_text(REWARDS)
    found: list[dict[str, Any]] = []
    for run, rewards in (("one", ["c"]), ("two", ["a", "b"])):
        functions = json.dumps([{"function": f"noise:{name}"} for name in rewards])
        keys = [f"run={run}", "iterations=1", "update.objective=dapo", f"score.rewards={functions}"]
        code, _, err = grpo("run", *(part for key in keys for part in ("--set", key)))
        assert code == 0, err
        query = "select rollouts_kept, rollouts_dropped, groups_without_signal, grad_norm from iterations"
        code, out, _ = grpo("sql", "--run", run, "--json", query)
        found += json.loads(out) if out.startswith("[") else [json.loads(out)]
    one, two = found
    assert one["rollouts_kept"] > 0
    assert one["rollouts_dropped"]["zero_variance"] > 0
    assert {**one, "grad_norm": 0} == {**two, "grad_norm": 0}
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)
