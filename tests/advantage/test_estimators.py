"""Each estimator: by hand, against plain numpy (estimators.py), and what must hold whatever the rewards."""

import inspect
import random
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from tests.advantage import estimators as plain
from tests.advantage.test_advantage import (
    Cells,
    Row,
    advantages,
    bits,
    column,
    commit,
    compute,
    make_run,
    own,
    rewards_table,
    rollouts_table,
    rows_of,
    shards,
)
from tests.conftest import Grpo

from grpo.advantage import stage
from grpo.config import AdvantageConfig, Config
from grpo.errors import DataError

ESTIMATORS: tuple[str, ...] = get_args(AdvantageConfig.model_fields["estimator"].annotation)
Groups = list[list[Row]]


def settings(name: str, k: int = 2) -> dict[str, Any]:
    return {"estimator": name, **({"pass_k": k} if name == "pass_at_k" else {})}


def drawn(name: str, seed: int, num_groups: int = 30, smallest: int = 2) -> Groups:
    """Groups of 2 to 9 rollouts with two rewards, of any length, that the estimator can take."""
    draw = random.Random(seed)
    weights = (
        (draw.uniform(0.1, 2), draw.uniform(-2, 2)) if name not in ("maxrl", "pass_at_k") else (2.0, 0.5)
    )

    def rewards() -> dict[str, tuple[str, float | None, float]]:
        if name == "pass_at_k":
            return {"a": ("ok", float(draw.random() < 0.4), 1.0)}
        if name == "maxrl":
            return {n: ("ok", draw.expovariate(1), w) for n, w in zip("ab", weights, strict=True)}
        return {
            n: ("ok", draw.gauss(0, 10 ** draw.uniform(-2, 2)), w) for n, w in zip("ab", weights, strict=True)
        }

    groups = [
        [Row(rewards(), response_tokens=draw.randint(1, 40)) for _ in range(draw.randint(smallest, 9))]
        for _ in range(num_groups)
    ]
    groups[0] = [Row(groups[0][0].cells, response_tokens=t) for t in (1, 2, 3)]  # one without signal
    return groups


def restated(name: str, groups: Groups, epsilon: float = 1e-4) -> list[float]:
    values = [np.array([[c[1] for c in row.cells.values()] for row in group], float).T for group in groups]
    weights = np.array([w for _, _, w in groups[0][0].cells.values()])
    lengths = [np.array([row.response_tokens for row in group], float) for group in groups]
    terms = [weights[:, None] * v for v in values]
    if name == "gdpo":
        found = plain.gdpo(values, weights, epsilon)
    elif name == "pass_at_k":
        found = [plain.pass_at_k(v[0], 2) for v in values]
    else:
        found = plain.PLAIN[name](terms, lengths, epsilon)
    level = [plain.equal(t.sum(axis=0), np.abs(t).sum(axis=0)) for t in terms]
    return [
        float(x) for group, same in zip(found, level, strict=True) for x in (0 * group if same else group)
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Rewards 1, 0, 0, 1 of lengths 1, 3, 3, 1.
        ("rloo", [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ("maxrl", [1, -1, -1, 1]),
        ("opo", [0.75, -0.25, -0.25, 0.75]),  # baseline 2 / 8
        # R = 1 - 1/6; s = sqrt(5/36) = 0.372678; right (1/6) / s, wrong (1/6 - 1/3) / s
        ("pass_at_k", [0.4472136, -0.4472136, -0.4472136, 0.4472136]),
        ("best_of_k", [0, 0, 0, 0]),  # a tie
        # b = +-0.5; over 8 tokens the mean is (2 - 6) * 0.5 / 8 = -0.25; squares 2 * 0.5625 + 6 * 0.0625
        ("reinforce_pp", [0.75 / ((1.5 / 7) ** 0.5 + 1e-4), -0.25 / ((1.5 / 7) ** 0.5 + 1e-4)] * 2),
    ],
)
def test_by_hand(tmp_path: Path, name: str, expected: list[float]) -> None:
    if name == "reinforce_pp":
        expected = [expected[0], expected[1], expected[1], expected[0]]
    group = [Row(reward, response_tokens=tokens) for reward, tokens in ((1, 1), (0, 3), (0, 3), (1, 1))]
    rows = advantages(tmp_path, [group], **settings(name))
    assert column(rows, "advantage") == pytest.approx(expected, rel=1e-6)
    assert column(rows, "group_std") == pytest.approx([0.57735027] * 4)


def test_best_of_k_by_hand(tmp_path: Path) -> None:
    # 3, 1, 0, 0: mean 1, squares 4 + 0 + 1 + 1, / 3: sqrt(2); 3 is 2 better than the second
    rows = advantages(tmp_path, [rows_of(3, 1, 0, 0)], estimator="best_of_k")
    assert column(rows, "advantage") == pytest.approx([2 / (2**0.5 + 1e-4), 0, 0, 0])


def test_gdpo_by_hand(tmp_path: Path) -> None:
    # Two rewards of 1 and 100 that disagree on two of four: each counts the same, and they cancel there.
    group = [Row({"a": ("ok", a, 1.0), "b": ("ok", b, 1.0)}) for a, b in ((1, 100), (1, 0), (0, 100), (0, 0))]
    rows = advantages(tmp_path, [group], estimator="gdpo", epsilon=0.0)
    # a_ik = +-0.5 / sqrt(1/3); sums 2, 0, 0, -2 of that, whose deviation is sqrt(8/3) of it
    assert column(rows, "advantage") == pytest.approx([2 / (8 / 3) ** 0.5, 0, 0, -2 / (8 / 3) ** 0.5])


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
def test_as_plain_numpy_has_it(tmp_path: Path, name: str, seed: int) -> None:
    groups = drawn(name, seed)
    found = np.array(column(advantages(tmp_path, groups, **settings(name)), "advantage"))
    expected = np.array(restated(name, groups))
    assert np.linalg.norm(found - expected) <= 1e-10 * np.linalg.norm(expected)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_rows_of_a_group_and_groups_in_any_order(tmp_path: Path, name: str) -> None:
    groups = drawn(name, 5)
    draw = random.Random(1)
    order = draw.sample(range(len(groups)), len(groups))
    places = [draw.sample(range(len(group)), len(group)) for group in groups]
    shuffled = [[groups[g][i] for i in places[g]] for g in order]
    first = {key_of(row): row["advantage"] for row in advantages(tmp_path / "a", groups, **settings(name))}
    other = {key_of(row): row["advantage"] for row in advantages(tmp_path / "b", shuffled, **settings(name))}
    for place, g in enumerate(order):
        for new, old in enumerate(places[g]):
            assert other[place, new] == pytest.approx(first[g, old], rel=1e-9, abs=1e-12)


def key_of(row: dict[str, Any]) -> tuple[int, int]:
    return row["group_id"], row["sample_id"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_same_bits_for_any_layout_and_block(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = drawn(name, 7, num_groups=60)
    weights = {n: w for n, (_, _, w) in groups[0][0].cells.items()}
    rollouts, rewards = rollouts_table(groups), rewards_table(groups)
    found = []
    for number, cuts in enumerate(([], [20, 111])):
        run = make_run(tmp_path / str(number), **settings(name))
        commit(run, "rollouts", 0, shards(rollouts, cuts)[::-1])
        summary = {"failed": 0, "weights": weights}
        commit(
            run, "rewards", 0, shards(rewards, cuts), ids=[f"reward/{n}" for n in weights], summary=summary
        )
        found.append(bits(compute(run)))
    monkeypatch.setattr(stage, "BLOCK_ROWS", 40)
    found.append(bits(compute(run)))
    assert found[0] == found[1] == found[2]
    assert (len(run.require("advantages", 0, "").files) > 3) == (name not in ("gdpo", "reinforce_pp"))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_kept_is_the_same_for_each(tmp_path: Path, name: str) -> None:
    groups: Groups = [
        rows_of(1, 0),
        rows_of(1),
        rows_of(1, 1),
        [Row(1), Row(0), Row({"r": ("error", None, 1.0)}), Row(1, response_tokens=0)],
        [Row(1, finish_reason="length"), Row(0), Row(0, finish_reason="abort")],
    ]
    rows = advantages(tmp_path, groups, drop_zero_variance=True, truncated="drop", **settings(name))
    assert column(rows, "reason") == [
        *[None, None, "group_too_small", "zero_variance", "zero_variance"],
        *[None, None, "unscored", "empty", "truncated", None, "unscored"],
    ]
    assert column(rows, "keep") == [reason is None for reason in column(rows, "reason")]
    assert [x is None for x in column(rows, "advantage")] == [not keep for keep in column(rows, "keep")]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_copy_of_the_file_is_the_estimator(tmp_path: Path, name: str) -> None:
    groups = drawn(name, 3)
    text = (Path(stage.__file__).parent / "estimators" / f"{name}.sql").read_text()
    named = advantages(tmp_path / "named", groups, **settings(name))
    copied = own(tmp_path / "copied", text, groups, **({"pass_k": 2} if name == "pass_at_k" else {}))
    assert bits(copied) == bits(named)


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("maxrl", [rows_of(1, 0), rows_of(1, -0.5)], r"\(0, 1, 1\) has reward -0\.5, and maxrl divides"),
        (
            "pass_at_k",
            [rows_of(1, 0, 0), rows_of(1, 0.5, 0)],
            r"\(0, 1, 1\) has reward 0\.5, and pass_at_k counts",
        ),
        (
            "pass_at_k",
            [rows_of(1, 0, 0), rows_of(1, 0)],
            r"\(0, 1, 0\) is one of 2 scored in its group, fewer",
        ),
    ],
)
def test_rewards_that_it_cannot_take(tmp_path: Path, name: str, groups: Groups, message: str) -> None:
    with pytest.raises(DataError, match=rf"^advantage: rollout \(.*\) {message}") as caught:
        advantages(tmp_path, groups, **settings(name, 3))
    assert caught.value.exit_code == 3


def test_pass_at_k_takes_a_sum_of_rewards_that_is_1_but_for_rounding(tmp_path: Path) -> None:
    parts: Cells = {"a": ("ok", 1.0, 0.1), "b": ("ok", 1.0, 0.2), "c": ("ok", 1.0, 0.7)}
    none: Cells = {name: ("ok", 0.0, weight) for name, (_, _, weight) in parts.items()}
    rows = advantages(tmp_path, [[Row(parts), Row(none), Row(none), Row(parts)]], **settings("pass_at_k"))
    assert column(rows, "advantage") == pytest.approx([0.4472136, -0.4472136, -0.4472136, 0.4472136])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimator": "pass_at_k"}, "pass_k and `estimator: pass_at_k` belong together"),
        ({"pass_k": 2}, "pass_k and `estimator: pass_at_k` belong together"),
        ({"estimator": "pass_at_k", "pass_k": 9}, "advantage.pass_k: 9 of generate.samples_per_prompt, 8"),
        ({"estimator": "rloo", "sql": "my.sql"}, "estimator names a query, and so does sql"),
        ({"estimator": "rloo", "scale": "none"}, "advantage.scale: the estimator rloo has none"),
        ({"estimator": "maxrl", "epsilon": 0.1}, "advantage.epsilon: the estimator maxrl has none"),
    ],
)
def test_keys_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    config = {"run": "a", "model": "b", "prompts": {"source": "c"}, "generate": {"samples_per_prompt": 8}}
    score = {"rewards": [{"function": "exact_answer"}]}
    with pytest.raises(ValueError, match=message):
        Config.model_validate({**config, "score": score, "advantage": given})


def test_the_default_is_no_part_of_a_fingerprint() -> None:
    assert set(AdvantageConfig().recorded()).isdisjoint({"estimator", "pass_k"})
    assert AdvantageConfig(estimator="rloo").recorded()["estimator"] == "rloo"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_run_with_an_estimator(project: Path, grpo: Grpo, name: str) -> None:
    """By name alone too, when its configuration is that in run.json; rewards are 0 to 6, here 0 or 1."""
    Path("reward.py").write_text(
        "def code(completions, **columns):\n    return [float(i % 2) for i, _ in enumerate(completions)]\n"
    )
    keys = {"estimator": name, **settings(name)}
    code, _, err = grpo("run", *(part for k, v in keys.items() for part in ("--set", f"advantage.{k}={v}")))
    assert code == 0, err
    query = "select count(*) as n from samples where keep and iteration = 1"
    code, out, err = grpo("sql", "--run", "tiny", "--json", query)
    assert (code, '"n": 6' in out or '"n":6' in out) == (0, True), err


def trl_gdpo(values: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """What the lines of the installed TRL give; values[g]: [rewards, rollouts], NaN: does not apply."""
    import torch
    from trl.trainer import grpo_trainer

    source = inspect.getsource(grpo_trainer)
    first = source.index('elif self.multi_objective_aggregation == "normalize_then_sum":')
    lines = source[first : source.index("\n        else:", first)].partition("\n")[2]
    reward_weights = torch.tensor(weights)
    names: dict[str, Any] = {
        "self": SimpleNamespace(reward_funcs=weights, reward_weights=reward_weights),
        "torch": torch,
        "nanstd": grpo_trainer.nanstd,
        "device": "cpu",
        "num_generations": values[0].shape[1],
        "rewards_per_func": torch.tensor(np.concatenate([v.T for v in values])),
        "unscorable_mask": torch.zeros(sum(v.shape[1] for v in values), dtype=torch.bool),
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of its n / (n - 1): float32 is 2e-8 off
    try:
        exec(textwrap.dedent(lines), names)
    finally:
        torch.set_default_dtype(before)
    found: np.ndarray = names["advantages"].numpy()
    return found


def test_gdpo_is_that_of_trl(tmp_path: Path) -> None:
    """A reward that does not apply, a group without signal and negative weights among them."""
    draw = np.random.default_rng(0)
    weights = np.array([1.0, 0.3, -2.0])
    values = [draw.normal(size=(3, 6)) * [[1], [10], [0.1]] for _ in range(12)]
    values[1][0, 2] = values[2][1, :] = np.nan
    values[3][:] = values[3][:, :1]
    groups = [
        [
            Row(
                {
                    name: ("ok", float(x), w) if np.isfinite(x) else ("not_applicable", None, w)
                    for name, x, w in zip("abc", column_of, weights.tolist(), strict=True)
                }
            )
            for column_of in v.T
        ]
        for v in values
    ]
    found = np.array(column(advantages(tmp_path, groups, estimator="gdpo"), "advantage"))
    expected = trl_gdpo(values, weights)
    assert np.linalg.norm(found - expected) <= 1e-10 * np.linalg.norm(expected)


def test_gdpo_where_it_differs_from_trl(tmp_path: Path) -> None:
    """Rewards that cancel in the sum of every rollout of a group: no signal here, and some in TRL."""
    values = [np.array([[1.0, 0, 0, 1], [0, 2, 2, 0]]), np.array([[1.0, 0, 0, 0], [0, 1, 0, 0]])]
    weights = np.array([1.0, 0.5])
    groups = [[Row({"a": ("ok", a, 1.0), "b": ("ok", b, 0.5)}) for a, b in v.T.tolist()] for v in values]
    rows = advantages(tmp_path, groups, estimator="gdpo")
    assert column(rows, "advantage")[:4] == [0.0] * 4
    assert column(rows, "group_std")[:4] == [0.0] * 4
    assert np.abs(trl_gdpo(values, weights)[:4]).min() > 0.1
