"""What stands beside newer rows that it was not made of is said in one line, wherever it is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Grpo

import grpo as door
from grpo.inspect.rows import Rows

OTHER = 'score.rewards=[{function: "reward:length"}]'
BOTH = 'score.rewards=[{function: "reward:code"}, {function: "reward:length"}]'
WEIGHTED = 'score.rewards=[{function: "reward:code", weight: 2}]'
UNWEIGHTED = 'score.rewards=[{function: "reward:code"}, {function: "reward:length", weight: 0}]'
OLD_SUM = (
    "run tiny: advantages of iterations 0 to 1 are older than their rewards: `reward` is the old sum;"
    " `grpo advantage tiny --iteration 0-1 --force` reruns them\n"
)


def do(grpo: Grpo, *arguments: str) -> str:
    code, out, err = grpo(*arguments)
    assert code == 0, err
    return out


def said(grpo: Grpo, *arguments: str) -> str:
    """What a reader says on stderr, besides where the report is."""
    code, _, err = grpo(*arguments)
    assert code == 0, err
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("report: "))


@pytest.mark.parametrize("rewards", [OTHER, BOTH, WEIGHTED], ids=["another", "one more", "its weight"])
def test_advantages_older_than_rewards_are_said_until_they_are_made_again(
    finished: Path, grpo: Grpo, rewards: str
) -> None:
    do(grpo, "score", "--iteration", "all", "--force", "--set", rewards)
    assert said(grpo, "sql", "--json", "select reward from samples") == OLD_SUM
    command = OLD_SUM.split("`")[3].split()[1:]  # what it names does it
    do(grpo, *command)
    assert said(grpo, "sql", "--json", "select reward from samples") == ""


@pytest.mark.parametrize(
    ("reader", "line"),
    [
        (["show", "--no-pager", "--iteration", "1"], OLD_SUM.replace("iterations 0 to 1", "iteration 1")),
        (["show", "--json", "--prompt", "0"], ""),
        (["sql", "--json", "from iterations"], OLD_SUM),
        (["sql", "--csv", "select avg(reward) as r from SAMPLES"], OLD_SUM),
        (["sql", 'select reward from "advantages"'], OLD_SUM),
        (["sql", "--json", "select count(*) as n from eval_samples"], ""),
        (["sql", "--json", "from rewards"], ""),
        (["report", "--json"], OLD_SUM),
        (["compare", "--json", "length", "reward"], OLD_SUM),
        (["compare", "--json", "code", "length"], ""),
    ],
)
def test_every_reader_says_it_of_what_it_reads(
    finished: Path, grpo: Grpo, reader: list[str], line: str
) -> None:
    do(grpo, "score", "--iteration", "all", "--force", "--set", BOTH)
    code, out, err = grpo(*reader)
    assert code == 0, err
    assert "older" not in out
    if "--prompt" in reader:  # when it was drawn follows from the seed
        assert err.startswith("run tiny: advantages of iteration")
        return
    assert said(grpo, *reader) == line.replace(
        "--iteration 0-1", "--iteration 1" if "iteration 1" in line else "--iteration 0-1"
    )


def test_two_runs_are_told_apart(finished: Path, grpo: Grpo) -> None:
    do(grpo, "fork", "tiny", "other", "--iteration", "1")
    do(grpo, "run", "other")
    do(grpo, "score", "other", "--iteration", "0", "--force", "--set", OTHER)
    for command in (
        ["compare", "--json", "tiny", "other"],
        ["sql", "--json", "--run", "*", "from iterations"],
    ):
        lines = said(grpo, *command)
        assert lines == (
            "run other: advantages of iteration 0 are older than their rewards: `reward` is the old sum;"
            " `grpo advantage other --iteration 0 --force` reruns them\n"
        )


def test_other_rollouts_under_old_rewards_and_log_probs(finished: Path, grpo: Grpo) -> None:
    do(grpo, "generate", "--iteration", "0", "--force", "--set", "generate.temperature=0.5")
    line = (
        "run tiny: rewards of iteration 0 are older than their rollouts: they are of other responses;"
        " `grpo score tiny --iteration 0 --force` reruns them\n"
    )
    assert said(grpo, "sql", "--json", "from samples") == line
    assert said(grpo, "compare", "--json", "code", "reward") == line
    do(grpo, "score", "--iteration", "0")
    assert "advantages of iteration 0 are older" in said(grpo, "sql", "--json", "from samples")
    do(grpo, "advantage", "--iteration", "0")
    assert said(grpo, "sql", "--json", "from samples") == (
        "run tiny: log-probs of the learner of iteration 0 are older than their rollouts: they are of other"
        " responses; `grpo update tiny --iteration 0 --force` reruns them\n"
    )


@pytest.mark.parametrize("settings", [[], ["--set", UNWEIGHTED]], ids=["the same values", "of weight 0"])
def test_a_rescore_that_changes_no_sum_is_not_said(finished: Path, grpo: Grpo, settings: list[str]) -> None:
    do(grpo, "score", "--iteration", "all", "--force", *settings)
    assert said(grpo, "sql", "--json", "from samples") == said(grpo, "report", "--json") == ""


def test_the_python_door_says_it(finished: Path, grpo: Grpo, capsys: pytest.CaptureFixture[str]) -> None:
    do(grpo, "score", "--iteration", "all", "--force", "--set", OTHER)
    run = door.open("tiny")
    capsys.readouterr()
    query = "select reward from samples"
    reads: list[Callable[[], Rows]] = [lambda: run.samples, lambda: run.iterations, lambda: run.sql(query)]
    for read in reads:
        assert len(read()) > 0
        assert capsys.readouterr().err == OLD_SUM
    assert len(run.table("rewards")) > 0
    assert capsys.readouterr().err == ""


def test_a_run_elsewhere_is_named_by_its_path(
    finished: Path, grpo: Grpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do(grpo, "score", "--iteration", "0", "--force", "--set", OTHER)
    monkeypatch.chdir(finished / "artifacts" / "tiny")
    err = said(grpo, "sql", "--json", "--run", "../tiny", "from samples")
    assert "`grpo advantage ../tiny --iteration 0 --force`" in err


def test_a_damaged_manifest_is_not_read_for_it(finished: Path, grpo: Grpo) -> None:
    (finished / "artifacts/tiny/iteration=000000/advantages/manifest.json").write_text("{")
    assert json.loads(do(grpo, "sql", "--json", "select 1 as one")) == [{"one": 1}]
    code, _, err = grpo("sql", "--json", "from samples")
    assert code == 6
    assert "advantages/manifest.json: is not JSON" in err
