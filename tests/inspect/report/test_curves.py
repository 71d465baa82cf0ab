import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from tests.conftest import Grpo

from grpo import sql
from grpo.artifacts import ActiveRun
from grpo.cli.options import reading
from grpo.inspect import report
from grpo.inspect.report import curves
from grpo.inspect.report.picture import _panel

Charts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def charts(hand: ActiveRun) -> Charts:
    return {chart["title"]: chart for chart in report.charts([hand])}


@pytest.mark.parametrize(
    ("title", "unit", "expected"),
    [
        ("Reward", "", [4 / 3, 1.75]),  # (2.5 + 0.5 + 1) / 3, the unscored one left out; (2 + 2 + 2 + 1) / 4
        ("Pass rate: right", "share", [0.25, 0.75]),  # 1 of 4; 3 of 4
        ("Reward: short", "", [2.0, 2.0]),  # (3 + 1 + 2) / 3, the failed one left out
        (
            "Entropy",
            "nats",
            [7.25, 1.0],
        ),  # (100 * 2 + 300 * 9) / 400; the step that was skipped does not count
        ("Response length", "tokens", [2.5, 3.0]),  # with the end: (2 + 4 + 2 + 2) / 4
        ("Truncated", "share", [0.25, 0.25]),
        ("Mismatch", "nats", [1e-6, 2e-6]),
        ("Groups without signal", "share", [0.5, 1.0]),  # one of two has a deviation in iteration 0
        ("Gradient norm", "", [3.5, 1.0]),  # (100 * 2 + 300 * 4) / 400
    ],
)
def test_the_numbers_of_a_curve(charts: Charts, title: str, unit: str, expected: list[float]) -> None:
    [series] = charts[title]["series"]
    assert (charts[title]["unit"], series["run"], series["x"]) == (unit, "hand", [0, 1])
    assert series["y"] == pytest.approx(expected, rel=1e-12)


def test_kl_has_no_value_where_the_loss_has_no_term(charts: Charts) -> None:
    [series] = charts["KL to the reference"]["series"]
    assert (series["x"], series["y"]) == ([0], [6.8125])  # (100 * 0.25 + 300 * 9) / 400


def test_clip_fractions_are_means_over_the_steps_taken(charts: Charts) -> None:
    found = {each["name"]: each["y"] for each in charts["Clipped"]["series"]}
    assert found == {"low": pytest.approx([0.075, 0.0]), "high": pytest.approx([0.225, 0.0])}


def test_what_a_run_does_not_have_is_empty_and_says_why(charts: Charts) -> None:
    assert charts["Seconds by stage"]["series"] == []  # written by hand: nothing was timed
    assert charts["Seconds by stage"]["absent"] == "nothing was timed"


def test_the_curves_agree_with_what_grpo_status_shows(
    complete: Path, monkeypatch: pytest.MonkeyPatch, grpo: Grpo
) -> None:
    """On a run that the stages made: the same reward, KL, entropy, length, mismatch and seconds."""
    monkeypatch.chdir(complete)
    status = json.loads(grpo("status", "--json")[1])["iterations"]
    charts = {
        chart["title"]: chart["series"]
        for chart in report.charts([reading("tiny", Path("pipeline.yaml"), [])])
    }
    places = {"reward": "Reward", "kl": "KL to the reference", "entropy": "Entropy",
              "response_tokens": "Response length", "mismatch_mean": "Mismatch",
              "truncated": "Truncated"}  # fmt: skip
    for name, title in places.items():
        assert charts[title][0]["y"] == pytest.approx([each[name] for each in status], rel=1e-9), name
    seconds = {each["name"]: each["y"] for each in charts["Seconds by stage"]}
    assert list(seconds) == ["generate", "score", "advantage", "update"]
    for stage, values in seconds.items():
        assert values == pytest.approx([each["stage_seconds"][stage] for each in status]), stage


def test_the_last_evaluation_is_no_iteration_that_took_seconds(
    complete_and_measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two iterations, and policies 0, 1 and 2 measured: that of 2 is no part of an iteration."""
    monkeypatch.chdir(complete_and_measured)
    charts = {
        chart["title"]: chart["series"]
        for chart in report.charts([reading("tiny", Path("pipeline.yaml"), [])])
    }
    assert charts["Held-out reward"][0]["x"] == [0, 1, 2]
    seconds = {each["name"]: each["x"] for each in charts["Seconds by stage"]}
    assert list(seconds) == ["generate", "score", "advantage", "update", "evaluate"]
    assert list(seconds.values()) == [[0, 1]] * 5


def test_the_curves_of_an_evaluation(hand: ActiveRun) -> None:
    """pass@1 and the largest k, each with its interval: here over a stand-in for the view `evals`."""
    view = """
        select 'hand' as run, 4 as iteration, 'right' as pass_reward,
            map([1, 2, 8]::bigint[], [0.25, 0.5, 0.75]) as pass_at,
            map([1, 2, 8]::bigint[], [0.125, 0.25, 0.5]) as pass_at_low,
            map([1, 2, 8]::bigint[], [0.375, 0.75, 1.0]) as pass_at_high,
            2.0 as reward, 1.5 as reward_low, 'inf'::double as reward_high, 3.5 as response_tokens
    """

    def read(connection: sql.Connection) -> list[dict[str, Any]]:
        connection.duckdb.execute(f"create temp view evals as {view}")
        return [chart for chart in curves.read(connection, ["hand"]) if chart["section"] == "evaluation"]

    found = sql.snapshot([hand], read)
    assert found[0]["title"] == "Held-out pass@k: right"
    passed, reward, length = (chart["series"] for chart in found)
    assert [each["name"] for each in passed] == ["pass@1", "pass@8"]
    assert [(each["y"], each["low"], each["high"]) for each in passed] == [
        ([0.25], [0.125], [0.375]),
        ([0.75], [0.5], [1.0]),
    ]
    assert (reward[0]["x"], reward[0]["y"], reward[0]["low"], reward[0]["high"]) == ([4], [2], [1.5], [None])
    assert length[0]["y"] == [3.5]


def test_what_a_dash_is_has_the_colour_of_no_run() -> None:
    series = [{"run": run, "name": side, "x": [0], "y": [0.1], "low": None, "high": None}
              for run, side in (("b", "low"), ("b", "high"))]  # fmt: skip
    chart = {"title": "Clipped", "unit": "share", "stacked": False, "series": series}
    axis = Figure().subplots()
    _panel(axis, chart, {"a": "#ff0000", "b": "#00ff00"})  # the first of the runs has none
    legend = axis.get_legend()
    assert legend is not None
    assert [line.get_label() for line in axis.lines] == ["low", "high"]
    assert {line.get_color() for line in legend.get_lines()} == {"#555555"}
    assert [text.get_text() for text in legend.get_texts()] == ["low", "high"]
