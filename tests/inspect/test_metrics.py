"""The view `iterations`, by hand; and that what manifests keep of it is the same."""

import json
import re
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.inspect.report.runs import make_run, row
from tests.pages.pages import DOCS

from grpo import sql
from grpo.artifacts import ActiveRun, Run
from grpo.cli.options import reading
from grpo.inspect import metrics

STEP = {"iteration": 0, "entropy": 1.0, "mismatch_mean": None}


@pytest.fixture
def hand(tmp_path: Path) -> Run:
    """One iteration of three groups of two rollouts, four optimiser steps of which one is skipped."""
    one = {"group_std": None, "group_size": 1}
    rows = [
        row(0, 0, 0, "a", rewards={"right": 1.0, "short": 3.0}, reward=2.5, group_std=0.7),
        row(0, 0, 1, "abc", rewards={"right": 0.5, "short": 1.0}, reward=0.5, group_std=0.7),
        row(0, 1, 0, "a", rewards={"right": 0.0}, reward=1.0, finish_reason="length"),
        row(0, 1, 1, "a", rewards={"right": 0.0}, reward=1.0, keep=False, reason="zero_variance"),
        row(
            0, 2, 0, "abcde", rewards={"right": 2.0}, reward=3.0, keep=False, reason="group_too_small", **one
        ),
        row(0, 2, 1, "a", rewards={"right": None}, reward=None, keep=False, reason="unscored", **one),
    ]
    updates = [
        {**STEP, "step": 0, "tokens": 900, "kl": 9.0, "grad_norm": None, "skipped": True},
        {**STEP, "step": 1, "tokens": 100, "kl": 0.25, "ratio_max": 1.0, "mismatch_mean": 1e-6},
        {**STEP, "step": 2, "tokens": 300, "kl": 0.5, "ratio_max": 3.0},
        {**STEP, "step": 3, "tokens": 100, "kl": 1.0, "ratio_max": 2.0},
    ]
    return make_run(tmp_path, rows, updates)


def test_the_numbers_of_an_iteration_by_hand(hand: ActiveRun) -> None:
    found = metrics.row_of(hand, 0)
    expected = {
        "reward": 1.6,  # (2.5 + 0.5 + 1 + 1 + 3) / 5, the unscored one left out
        "rewards": {"right": 0.7, "short": 2.0},  # (1 + 0.5 + 2) / 5; (3 + 1) / 2
        "pass_rate": 0.4,  # `right` is 1 or more in 2 of the 5 that have it
        "groups": 3,
        "groups_without_signal": 0.5,  # one of the two groups with two scored rollouts
        "rollouts": 6,
        "rollouts_kept": 3,
        "rollouts_dropped": {"group_too_small": 1, "unscored": 1, "zero_variance": 1},
        "tokens": 18,  # the letters and an end each: 2 + 4 + 2 + 2 + 6 + 2
        "steps": 4,
        "steps_skipped": 1,
        "kl": 0.55,  # (100 * 0.25 + 300 * 0.5 + 100 * 1) / 500
        "entropy": 1.0,
        "ratio_max": 3.0,
        "clip_fraction_low": None,
        "mismatch_mean": 1e-6,
        "response_tokens": 3.0,
        "response_tokens_max": 6,
        "truncated": 1 / 6,
        "seconds": None,
        "tokens_per_second": None,
        "eval_pass_at_1": None,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name


def test_what_counts_as_a_pass_is_what_an_evaluation_counts(tmp_path: Path) -> None:
    evaluate = {"prompts": {"source": "arithmetic"}, "pass_reward": "short", "pass_threshold": 2.0}
    rewards = [{"function": "exact_answer", "name": name} for name in ("right", "short")]
    rows = [
        row(0, 0, 0, rewards={"right": 1.0, "short": 1.0}),
        row(0, 0, 1, rewards={"right": 1.0, "short": 2.0}),
    ]
    run = make_run(tmp_path, rows, score={"rewards": rewards}, evaluate=evaluate)
    assert metrics.row_of(run, 0)["pass_rate"] == 0.5


def test_an_iteration_before_its_update_has_what_is_there(project: Path, grpo: Grpo) -> None:
    assert grpo("run", "--until", "0")[0] == 0
    assert grpo("generate")[0] == 0
    run = reading("", Path("pipeline.yaml"), [])
    found = metrics.row_of(run, 0)
    assert (found["rollouts"], found["reward"], found["rollouts_dropped"], found["kl"]) == (
        6,
        None,
        None,
        None,
    )
    assert metrics.kept_of(run, [0])[0] == {name: found[name] for name in metrics.kept_of(run, [0])[0]}


def test_the_view_has_the_columns_that_are_documented(hand: ActiveRun) -> None:
    section = (DOCS / "tables.md").read_text().partition("## iterations\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \| \S.* \|$", section, re.MULTILINE)
    assert documented == sql.read([hand], "from iterations").column_names


def test_an_evaluation_is_shown_with_the_iteration_that_samples_from_its_policy(measured: Path) -> None:
    run = reading("", Path("pipeline.yaml"), [])
    found = sql.read(
        [run], "select iteration, eval_pass_at_1, eval_reward from iterations order by iteration"
    )
    evals = sql.read([run], "select iteration, pass_at[1], reward from evals order by iteration")
    assert [list(row.values()) for row in found.to_pylist()] == [
        list(row.values()) for row in evals.to_pylist()[:2]
    ]  # the last of three policies is measured, and no iteration samples from it
    assert len(evals) == 3
    last = metrics.row_of(run, 1)
    times = metrics.times_of(run, 1)
    evaluated = {"evaluate": last["stage_seconds"]["evaluate"]}
    assert last["stage_seconds"] == pytest.approx({**times["stage_seconds"], **evaluated})
    assert last["seconds"] == pytest.approx(times["seconds"])
    assert last["tokens_per_second"] == pytest.approx(last["tokens"] / times["stage_seconds"]["generate"])


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("update.epochs=2", "update.steps_per_iteration=3"),  # six steps with other numbers of tokens
        ("advantage.where=reward > 100",),  # nothing is kept: every step is skipped
    ],
)
def test_what_manifests_keep_is_what_the_view_gives(
    options: tuple[str, ...], project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [word for option in options for word in ("--set", option)]
    assert grpo("run", *settings)[0] == 0
    run = reading("", Path("pipeline.yaml"), list(options))
    rows = {iteration: metrics.row_of(run, iteration) for iteration in range(2)}
    monkeypatch.setattr(sql, "read", None)  # the tables are not asked
    for iteration, kept in metrics.kept_of(run, range(2)).items():
        assert set(kept) == {
            *("reward", "kl", "entropy", "mismatch_mean", "tokens", "response_tokens", "truncated"),
            "policy_lag",
        }
        for name, value in kept.items():
            assert value == pytest.approx(rows[iteration][name], rel=1e-12), (iteration, name)


def test_of_manifests_that_keep_nothing_the_view_is_asked(hand: ActiveRun) -> None:
    kept = metrics.kept_of(hand, [0])[0]
    assert {name: kept[name] for name in ("reward", "kl", "tokens")} == pytest.approx(
        {"reward": 1.6, "kl": 0.55, "tokens": 18}
    )


def test_a_row_reads_its_own_iteration_and_no_other(finished: Path) -> None:
    for path in Path("artifacts/tiny/iteration=000000").glob("*/*.parquet"):
        path.unlink()
    assert metrics.row_of(reading("", Path("pipeline.yaml"), []), 1)["rollouts"] == 6


def test_what_counted_as_a_pass_is_not_what_the_file_says_now(measured: Path, grpo: Grpo) -> None:
    def rates(*arguments: str) -> list[float]:
        shown = grpo("sql", "select pass_rate from iterations order by all", "--json", *arguments)[1]
        return [row["pass_rate"] for row in json.loads(shown)]

    before = rates()
    path = Path("pipeline.yaml")
    path.write_text(path.read_text().replace("pass_threshold: 3.0", "pass_threshold: 100.0"))
    assert rates() == before
    assert any(before)
