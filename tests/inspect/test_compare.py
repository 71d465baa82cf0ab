import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.cli.test_cli import HOSTILE, SHOWN, hostile_rollouts
from tests.conftest import Grpo, copy_to_work_in, run_within
from tests.inspect.report import runs

REWARDS = 'score.rewards=[{function: "reward:code"}, {function: "reward:length", weight: 0}]'


@pytest.fixture(scope="module")
def scored_twice_once(complete: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose rollouts have the reward `length` too, of weight 0; read it only."""
    folder = tmp_path_factory.mktemp("compare") / "project"
    shutil.copytree(complete, folder)
    run_within(folder, "score", "--iteration", "0-1", "--force", "--set", REWARDS)
    return folder


@pytest.fixture
def scored_twice(scored_twice_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the test runs in it."""
    return copy_to_work_in(scored_twice_once, tmp_path, monkeypatch)


def compared(rows: list[tuple[Any, ...]], finished: Path) -> tuple[list[Any], list[Any]]:
    """What groups.sql and totals.sql make of (iteration, group_id, sample_id, a, b), with epsilon 0."""
    from grpo import sql
    from grpo.artifacts import ActiveRun
    from grpo.config import load
    from grpo.console import Console
    from grpo.inspect.compare.rewards import measured

    names = ("iteration", "group_id", "sample_id", "a", "b")
    data = [{**dict(zip(names, row, strict=True)), "prompt_id": 10 + row[1]} for row in rows]
    run = ActiveRun(Path("artifacts"), load(finished / "pipeline.yaml"), Path(), Console(quiet=True))
    with sql.connect([run], outputs=()) as connection:
        totals = measured(connection, pa.Table.from_pylist(data), 0.0)
        return sql.query(connection, "from groups order by all").to_pylist(), totals


def correlations(finished: Path, a: Any, b: Any) -> tuple[float | None, float | None]:
    """Spearman's and Kendall's, of rollouts in groups of two."""
    rows = [(0, n // 2, n % 2, float(x), float(y)) for n, (x, y) in enumerate(zip(a, b, strict=True))]
    total = compared(rows, finished)[1][-1]
    return total["spearman"], total["kendall"]


# Rank correlation


def test_spearman_by_hand(complete: Path) -> None:
    # ranks 1 2 3.5 3.5 and 2 1 3.5 3.5, less 2.5: products .75 + .75 + 1 + 1, squares 4.5 on either side
    assert correlations(complete, [1, 2, 3, 3], [20, 10, 30, 30])[0] == pytest.approx(3.5 / 4.5)
    assert correlations(complete, [1, 2, 9], [3, 2, 1])[0] == pytest.approx(-1)
    assert correlations(complete, [1, 1, 1], [3, 2, 1])[0] is None


def test_kendall_by_hand(complete: Path) -> None:
    # 10 pairs: 2 agree, 6 are flipped, 2 are tied in a and 1 in b: (2 - 6) / sqrt((10 - 2) (10 - 1))
    a, b = [12, 2, 1, 12, 2], [1, 4, 7, 1, 0]
    assert correlations(complete, a, b)[1] == pytest.approx(-4 / math.sqrt(72), abs=1e-15)
    assert correlations(complete, a, a)[1] == pytest.approx(1.0, abs=1e-15)
    assert correlations(complete, a, [0] * 5)[1] is None


def test_kendall_counts_as_all_pairs_do(complete: Path) -> None:
    random = np.random.default_rng(0)
    for levels in (2, 5, 1000):
        a, b = random.integers(0, levels, (2, 301)).astype(float)
        order_a, order_b = (np.sign(x[:, None] - x[None, :])[np.triu_indices(301, 1)] for x in (a, b))
        agreeing, flipped = (order_a * order_b > 0).sum(), (order_a * order_b < 0).sum()
        expected = (agreeing - flipped) / math.sqrt((order_a != 0).sum() * (order_b != 0).sum())
        assert correlations(complete, a, b)[1] == pytest.approx(expected, abs=1e-12)


def test_all_rollouts_of_one_group_correlate_as_the_group_does(complete: Path) -> None:
    a, b = np.random.default_rng(1).integers(0, 7, (2, 90)).astype(float)
    total = compared([(0, 0, n, a[n], b[n]) for n in range(90)], complete)[1][-1]
    for name in ("spearman", "kendall"):
        assert total[name] == pytest.approx(total[f"{name}_in_groups"], abs=1e-12)


# Groups


def test_groups_and_totals_by_hand(complete: Path) -> None:
    rows = [
        *((0, 0, 0, 1.0, 2.0), (0, 0, 1, 2.0, 1.0), (0, 0, 2, 3.0, 3.0), (0, 0, 3, 3.0, 3.0)),
        *((0, 1, 0, 0.3, 0.0), (0, 1, 1, 0.3, 1.0)),  # no signal in a: gained
        *((1, 0, 0, 0.0, 1.0), (1, 0, 1, 1.0, 0.0)),  # flipped
        (1, 1, 0, 5.0, 5.0),  # alone: no group
    ]
    (first, second, third), totals = compared(rows, complete)
    # of 6 pairs 4 agree, 1 is flipped, 1 is tied in both: 3 / sqrt(5 * 5)
    counts = ("pairs", "agreeing", "flipped", "tied_in_a", "tied_in_b", "tied_in_both")
    assert [first[name] for name in counts] == [6, 4, 1, 0, 0, 1]
    assert first["kendall"] == pytest.approx(0.6)
    assert first["spearman"] == pytest.approx(3.5 / 4.5)
    # both deviate by sqrt(2.75 / 3) = 0.957427; two of the four advantages differ by 1 / 0.957427
    assert first["advantage_difference"] == pytest.approx(2 / 0.9574271 / 4)
    assert (first["sign_flips"], first["prompt_id"]) == (0, 10)
    assert [second[name] for name in counts] == [1, 0, 0, 1, 0, 0]
    assert (second["signal_a"], second["signal_b"], second["kendall"], second["spearman"]) == (
        *(False, True),
        *(None, None),
    )
    assert second["advantage_difference"] == pytest.approx(0.5 / math.sqrt(0.5))
    assert (third["flipped"], third["sign_flips"], third["kendall"]) == (1, 2, -1.0)
    assert third["advantage_difference"] == pytest.approx(1 / math.sqrt(0.5))
    assert [row["iteration"] for row in totals] == [0, 1, None]
    total = totals[-1]
    expected = {"groups": 3, "rollouts": 8, "pairs": 8, "flipped": 2, "signal_gained": 1, "signal_lost": 0}
    assert {name: total[name] for name in expected} == expected
    assert (total["signal_in_both"], total["signal_in_none"], total["sign_flips"]) == (2, 0, 2)
    assert total["kendall_in_groups"] == pytest.approx((0.6 - 1) / 2)
    # weighted by rollouts: (4 * 0.522233 + 2 * 0.707107 + 2 * 1.414214) / 8
    assert total["advantage_difference"] == pytest.approx(0.791447, abs=1e-6)


# Two rewards


def test_two_rewards_of_a_run(scored_twice: Path, grpo: Grpo) -> None:
    code, out, err = grpo("compare", "code", "length", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert (data["compared"], data["run"], data["a"], data["b"]) == ("rewards", "tiny", "code", "length")
    assert data["rollouts"] == {"compared": 12, "without_both": 0}
    total = data["overall"]
    assert (total["groups"], total["pairs"]) == (6, 6)  # 2 iterations x 3 groups of 2
    names = ("agreeing", "flipped", "tied_in_a", "tied_in_b", "tied_in_both")
    assert sum(total[name] for name in names) == 6
    query = (
        "select iteration, group_id, rewards['code'] as a, rewards['length'] as b from samples order by all"
    )
    rows = json.loads(grpo("sql", query, "--json")[1])
    pairs: dict[Any, list[Any]] = {}
    for row in rows:
        pairs.setdefault((row["iteration"], row["group_id"]), []).append((row["a"], row["b"]))
    products = [(x[0] - y[0]) * (x[1] - y[1]) for x, y in pairs.values()]
    assert total["flipped"] == sum(product < 0 for product in products)
    assert total["agreeing"] == sum(product > 0 for product in products)
    assert [row["iteration"] for row in data["iterations"]] == [0, 1]
    assert 0 < len(data["examples"]) <= 3
    for example in data["examples"]:
        found = pairs[example["iteration"], example["group_id"]]
        assert sorted((row["a"], row["b"]) for row in example["samples"]) == sorted(found)
    code, out, err = grpo("compare", "code", "length", "--run", "tiny", "--iteration", "1", "--examples", "1")
    assert (code, err) == (0, "")
    assert "run tiny: code (A) against length (B)\n6 rollouts in 3 groups of iteration 1\n" in out


def test_a_reward_against_the_sum_that_it_is(scored_twice: Path, grpo: Grpo) -> None:
    data = json.loads(grpo("compare", "code", "reward", "--json")[1])
    total = data["overall"]
    assert total["flipped"] == total["tied_in_a"] == total["tied_in_b"] == total["advantage_difference"] == 0
    assert total["kendall"] == pytest.approx(1.0)
    assert data["examples"] == []  # they disagree nowhere


def test_what_a_model_wrote_is_text_in_a_comparison(scored_twice: Path, grpo: Grpo) -> None:
    hostile_rollouts()
    code, out, err = grpo("compare", "code", "length", "--iteration", "0")
    assert (code, err) == (0, "")
    assert SHOWN in out
    assert "\x1b" not in out
    examples = json.loads(grpo("compare", "code", "length", "--iteration", "0", "--json")[1])["examples"]
    assert examples[0]["samples"][0]["response"] == HOSTILE


# Two runs


def difference(folder: Path, a: dict[int, float], b: dict[int, float]) -> dict[str, Any]:
    """Of the reward of two runs made by hand; prompt_id -> the mean of its group, in one iteration."""
    from grpo.inspect.compare.runs import describe

    made = []
    for name, values in (("a", a), ("b", b)):
        rows = [
            runs.row(0, prompt, sample, reward=value + apart)
            for prompt, value in values.items()
            for sample, apart in enumerate((-0.5, 0.5))
        ]
        made.append(runs.make_run(folder, rows, name=name))
    numbers = describe(made[0], made[1], "all")["last"]["numbers"]
    [found] = [row for row in numbers if row["name"] == "reward"]
    return dict(found)


def test_difference_of_paired_groups_by_hand(tmp_path: Path) -> None:
    found = difference(tmp_path, {0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 2.0, 2: 5.0})
    # differences 1, 0, 2: mean 1, deviation 1, standard error 1 / sqrt(3); 1.959964 / sqrt(3) = 1.131586
    assert (found["a"], found["b"], found["difference"], found["paired"]) == (2.0, 3.0, 1.0, True)
    assert (found["low"], found["high"]) == (pytest.approx(-0.131586, abs=1e-6), pytest.approx(2.131586))


def test_difference_of_other_prompts_by_hand(tmp_path: Path) -> None:
    a, b = {7: 1.0, 8: 3.0}, {1: 5.0, 2: 7.0, 3: 9.0}
    found = difference(tmp_path / "two", a, b)
    # squared standard errors 2 / 2 and 4 / 3: 5 +- 1.959964 * sqrt(7 / 3)
    assert (found["difference"], found["paired"], found["groups_a"], found["groups_b"]) == (5.0, False, 2, 3)
    assert found["high"] - found["difference"] == pytest.approx(1.959964 * math.sqrt(7 / 3))
    alone = difference(tmp_path / "alone", {7: 1.0}, b)
    assert (alone["low"], alone["high"], alone["difference"]) == (None, None, 6.0)


def test_difference_over_the_groups_that_both_have_by_hand(tmp_path: Path) -> None:
    a = {7: 1.0, 8: 2.0, 9: 3.0}
    b = {7: 2.0, 8: 2.0, 5: 90.0, 6: 90.0, 4: 90.0}
    found = difference(tmp_path / "most", a, b)
    # two of three in common: differences 1 and 0, deviation sqrt(1/2), standard error 1/2
    assert (found["a"], found["b"], found["difference"], found["paired"]) == (1.5, 2.0, 0.5, True)
    assert (found["groups_a"], found["groups_b"]) == (2, 2)
    assert found["left_out"] == {"without_value": 0, "in_one_run": 4}
    assert found["high"] == pytest.approx(0.5 + 1.959964 / 2)
    # one of two in common is chance: all groups, as two samples
    found = difference(tmp_path / "chance", {7: 1.0, 9: 3.0}, b)
    assert (found["paired"], found["groups_a"], found["groups_b"]) == (False, 2, 5)
    assert found["left_out"] == {}


def test_a_group_without_a_value_in_one_run_is_left_out_of_the_pairs(finished: Path, grpo: Grpo) -> None:
    """Six prompts, drawn once each in two iterations; `some` does not apply to one of them."""
    with Path("reward.py").open("a") as file:
        file.write(
            "\n\ndef some(prompts, completions, **columns):\n"
            "    return [None if p == '0+1=' else float(len(c)) for p, c in zip(prompts, completions)]\n"
        )
    change = ("--set", 'score.rewards=[{name: code, function: "reward:some"}]')
    assert grpo("fork", "tiny", "other", "--iteration", "0", *change)[0] == 0
    assert grpo("run", "--set", "run=other", *change)[0] == 0
    code, out, err = grpo("compare", "tiny", "other", "--json")
    assert (code, err) == (0, "")
    numbers = {row["name"]: row for row in json.loads(out)["last"]["numbers"]}
    assert "means of iterations 0 to 1\n" in grpo("compare", "tiny", "other")[1]
    for name, groups in (
        ("reward", 5),
        ("rewards.code", 5),
        ("response_tokens", 6),
        ("groups_without_signal", 5),
    ):
        row = numbers[name]
        assert (row["paired"], row["groups_a"], row["groups_b"]) == (True, groups, groups), name
        assert row["left_out"] == {"without_value": 6 - groups, "in_one_run": 0}, name
    query = "select avg(reward) as mean from samples where prompt <> '0+1='"
    [row] = json.loads(grpo("sql", query, "--json")[1])
    assert numbers["reward"]["a"] == pytest.approx(row["mean"])  # of A too without that group
    page = grpo("compare", "tiny", "other")[1]
    assert "the same prompts in both: differences within a pair of groups\n" in page
    left_out = "left out of reward, rewards.code, groups_without_signal: 1 group"
    assert f"{left_out} of which one of the runs has no value\n" in page


def test_groups_that_one_run_sampled_beyond_are_left_out_of_the_pairs(finished: Path, grpo: Grpo) -> None:
    more = ("--set", "run=more", "--set", "generate.dynamic_sampling={min_groups: 6, max_rounds: 2}")
    assert grpo("run", "--until", "1", *more)[0] == 0
    data = json.loads(grpo("compare", "tiny", "more", "--json")[1])
    assert data["configuration"] == ['generate.dynamic_sampling: null -> {"min_groups": 6, "max_rounds": 2}']
    assert all(row["paired"] for row in data["last"]["numbers"])
    assert {row["groups_b"] for row in data["last"]["numbers"]} == {3}
    assert data["last"]["numbers"][0]["left_out"] == {"without_value": 0, "in_one_run": 3}
    page = grpo("compare", "tiny", "more")[1]
    text = "groups_without_signal: 3 groups of a prompt that only one of the runs drew there\n"
    assert text in page


def test_the_same_numbers_of_other_prompts_are_no_pairs(finished: Path, grpo: Grpo) -> None:
    others = Path("prompts.jsonl").read_text().replace("+1=", "+3=")
    Path("others.jsonl").write_text(others)
    assert grpo("run", "--until", "1", "--set", "run=other", "--set", "prompts.source=others.jsonl")[0] == 0
    data = json.loads(grpo("compare", "tiny", "other", "--json")[1])
    assert {(row["paired"], row["groups_a"], row["groups_b"]) for row in data["last"]["numbers"]} == {
        (False, 3, 3)
    }
    assert all(row["left_out"] == {} for row in data["last"]["numbers"])
    assert "other prompts in A than in B: differences between groups" in grpo("compare", "tiny", "other")[1]


def test_two_runs_of_which_one_is_a_fork(finished: Path, grpo: Grpo) -> None:
    change = ("--set", "update.learning_rate=0.5")
    assert grpo("fork", "tiny", "other", "--iteration", "0", *change)[0] == 0
    assert grpo("run", "--set", "run=other", *change)[0] == 0
    code, out, err = grpo("compare", "tiny", "other", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert (data["compared"], data["a"], data["b"], data["shared_iterations"]) == ("runs", "tiny", "other", 0)
    assert data["configuration"] == ["update.learning_rate: 0.01 -> 0.5"]
    # the first rollouts are shared, the policies that follow are not
    assert {output: found["iteration"] for output, found in data["parted"].items() if found} == {
        **{"rollouts": 1, "rewards": 1, "advantages": 1},
        **{"update": 0},
    }
    assert "policy" in data["parted"]["update"]["what"]
    curves = {curve["name"]: curve["points"] for curve in data["curves"]}
    assert list(curves)[:2] == ["reward", "rewards.code"]
    assert {"kl", "entropy", "response_tokens", "truncated", "groups_without_signal", "seconds"} < set(curves)
    assert curves["reward"][0]["a"] == curves["reward"][0]["b"]
    assert curves["rollouts_spent"][1] == {"iteration": 1, "a": 12, "b": 12}
    query = "select avg(response_tokens) as length from samples where iteration = 1"
    [other] = json.loads(grpo("sql", query, "--run", "other", "--json")[1])
    assert curves["response_tokens"][1]["b"] == other["length"]
    numbers = {row["name"]: row for row in data["last"]["numbers"]}
    # 3 groups of iteration 1; those of iteration 0 are the same in both
    assert (data["last"]["first"], data["last"]["last"]) == (1, 1)
    assert (numbers["reward"]["groups_a"], numbers["reward"]["paired"]) == (3, True)
    apart = other["length"] - curves["response_tokens"][1]["a"]
    assert numbers["response_tokens"]["difference"] == pytest.approx(apart)
    code, page, err = grpo("compare", "tiny", "other")
    assert (code, err) == (0, "")
    assert (
        "they share no iteration; the first that differ: generate 1, score 1, advantage 1, update 0" in page
    )
    assert "update.learning_rate: 0.01 -> 0.5" in page
    assert "\nmeans of iteration 1\n" in page
    code, out, _ = grpo("compare", "tiny", "other", "--iteration", "1", "--json")
    assert {p["iteration"] for c in json.loads(out)["curves"] for p in c["points"]} == {1}


def test_runs_that_do_not_differ(finished: Path, grpo: Grpo) -> None:
    assert grpo("fork", "tiny", "same")[0] == 0
    code, out, err = grpo("compare", "tiny", "same")
    assert (code, err) == (0, "")
    assert "no difference in the 2 iterations that both have" in out
    assert "configured differently (A -> B)\n  nothing\n" in out
    assert "no means: rollouts, rewards and advantages of these iterations are the same in both\n" in out
    assert json.loads(grpo("compare", "tiny", "same", "--json")[1])["last"] is None


# Which of the two


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["code", "nope"],
            2,
            "code nope: expected two rewards or two runs; rewards of tiny: code, length, reward (their"
            " weighted sum); runs: code, length, tiny",
        ),
        (
            ["reward", "tiny"],
            2,
            "reward tiny: expected two rewards or two runs; rewards of tiny: code, length, reward (their"
            " weighted sum); runs: code, length, tiny",
        ),
        (
            ["code", "length"],
            2,
            "code length: names of rewards and of runs; --run NAME says that the rewards of that run are"
            " meant; rewards of tiny: code, length, reward (their weighted sum); runs: code, length, tiny",
        ),
        (
            ["code", "code"],
            2,
            "code code: cannot compare a thing with itself; give two rewards or two runs",
        ),
        (
            ["code", "length", "--run", "none"],
            2,
            "artifacts/none: no such run; runs there: code, length, tiny",
        ),
        (
            ["code", "reward", "--iteration", "x"],
            2,
            "--iteration x: expected a number such as 3, a range such as 0-19, or all",
        ),
        (["code", "reward", "--iteration", "7-9"], 2, "--iteration 7-9: run tiny has rollouts of 0 to 1"),
        (["code", "reward", "--iteration", "1-99"], 2, "--iteration 1-99: run tiny has rollouts of 0 to 1"),
        (
            ["tiny", "code", "--iteration", "0-2"],
            2,
            "tiny code: do not have all of --iteration 0-2 in common; rollouts: tiny of 0 to 1, code of 0 to"
            " 1",
        ),
        (
            ["tiny", "code", "--iteration", "7"],
            2,
            "tiny code: do not have all of --iteration 7 in common; rollouts: tiny of 0 to 1, code of 0 to 1",
        ),
    ],
)
def test_what_cannot_be_compared(
    scored_twice: Path, grpo: Grpo, arguments: list[str], code: int, message: str
) -> None:
    for name in ("code", "length"):  # runs with the names of rewards
        assert grpo("fork", "tiny", name)[0] == 0
    if arguments[0] == "tiny":
        Path("pipeline.yaml").unlink()  # then only runs can be meant
    assert grpo("compare", *arguments) == (code, "", f"error: {message}\n")


def test_a_reward_that_an_iteration_does_not_have(finished: Path, grpo: Grpo) -> None:
    assert grpo("score", "--iteration", "1", "--force", "--set", REWARDS)[0] == 0
    assert grpo("compare", "code", "length", "--iteration", "0") == (
        *(4, ""),
        "error: run tiny: no rollout of iteration 0 has a value of length; give the reward weight 0 in"
        " score.rewards, and `grpo score --iteration N --force` scores old rollouts\n",
    )
    data = json.loads(grpo("compare", "code", "length", "--json")[1])
    assert data["rollouts"] == {"compared": 6, "without_both": 6}


def test_the_weighted_sum_is_there_after_advantage(project: Path, grpo: Grpo) -> None:
    for command in ("generate", "score"):
        assert grpo(command)[0] == 0
    assert grpo("compare", "code", "reward") == (
        *(4, ""),
        "error: run tiny: no rollout has a value of reward; `grpo advantage` computes the weighted sum\n",
    )


def test_runs_of_which_one_is_not_begun_have_nothing_in_common(finished: Path, grpo: Grpo) -> None:
    assert grpo("run", "--until", "0", "--set", "run=empty")[0] == 0
    assert grpo("compare", "tiny", "empty") == (
        *(2, ""),
        "error: tiny empty: have no iteration in common; rollouts: tiny of 0 to 1, empty of none\n",
    )


def test_the_iteration_that_a_fork_shares_is_named(finished: Path, grpo: Grpo) -> None:
    change = ("--set", "update.learning_rate=0.5")
    assert grpo("fork", "tiny", "later", "--iteration", "1", *change)[0] == 0
    assert grpo("run", "--set", "run=later", *change)[0] == 0
    page = grpo("compare", "tiny", "later")[1]
    assert "\niteration 0 is the same in both; the first that differ: update 1\n" in page


def test_the_page_shows_what_is_printed(scored_twice: Path, grpo: Grpo) -> None:
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    printed = grpo("compare", "code", "length", "--run", "tiny")[1]
    summary = printed.split("rank correlation")[1].split(" iteration ")[0]
    labels = [line.rsplit("  ", 2)[0].strip() for line in summary.splitlines()[1:] if line.strip()]
    names = [re.split(r"  +", label)[0] for label in labels]
    assert len(names) == 16
    assert [name for name in names if name not in page] == []


def test_a_reward_that_one_run_has_is_named_with_its_values(finished: Path, grpo: Grpo) -> None:
    more = "score.rewards=[{function: 'reward:code'}, {function: 'reward:length', weight: 2}]"
    assert grpo("fork", "tiny", "more", "--iteration", "1", "--set", more)[0] == 0
    code, out, err = grpo("compare", "tiny", "more", "--json")
    assert code == 0, err
    assert json.loads(out)["configuration"] == [
        'score.rewards.length: added (function: "reward:length", weight: 2.0)'
    ]
