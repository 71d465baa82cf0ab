"""Rounds of further prompts until enough groups have signal: on disk, resumable, and right everywhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo, run_within
from tests.faults import crash

from grpo.generate.engines.protocol import group_seed

RUN = Path("artifacts/tiny")
WANTED, MAX_ROUNDS = 5, 3
RESAMPLE = f"generate.dynamic_sampling={{min_groups: {WANTED}, max_rounds: {MAX_ROUNDS}}}"
SETTING = ("--set", RESAMPLE)
STAGES = ("generate", "score", "advantage", "update")
ONE = ("--until", "1", *SETTING)


@pytest.fixture(scope="module")
def resampled(write_project: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project of one iteration, which takes three rounds, and what `run` said; read it only."""
    folder = write_project(tmp_path_factory.mktemp("resampled") / "project")
    return folder, run_within(folder, "run", *ONE)


@pytest.fixture
def rounds(resampled: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the test runs in it."""
    shutil.copytree(resampled[0], tmp_path / "rounds")
    monkeypatch.chdir(tmp_path / "rounds")
    return tmp_path / "rounds"


def manifest(output: str, run: str = "tiny") -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        Path(f"artifacts/{run}/iteration=000000/{output}/manifest.json").read_text()
    )
    return data


def rows(grpo: Grpo, query: str) -> list[dict[str, Any]]:
    code, out, err = grpo("sql", query, "--json")
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)
    return found


def states(grpo: Grpo, *options: str) -> dict[str, str]:
    """State of each stage of iteration 0, with the reason where there is one."""
    code, out, err = grpo("status", "--json", *SETTING, *options)
    assert code == 0, err
    stages = json.loads(out)["iterations"][0]["stages"]
    return {name: ": ".join(filter(None, stages[name].values())) for name in STAGES}


def do(grpo: Grpo, *command: str) -> str:
    code, _, err = grpo(*command)
    assert code == 0, err
    return err


def test_rounds_are_sampled_until_there_is_signal(
    resampled: tuple[Path, str], rounds: Path, grpo: Grpo
) -> None:
    folder, said = resampled
    found = rows(
        grpo, "select round, group_id, prompt_id, min(seed) as seed from rollouts group by all order by all"
    )
    assert [(row["round"], row["group_id"]) for row in found] == [(n // 3, n) for n in range(9)]
    assert [row["seed"] for row in found] == [group_seed(0, 0, n) for n in range(9)]
    prompts = [row["prompt_id"] for row in found]
    assert sorted(prompts[:6]) == list(range(6))  # the second round has the prompts of the first's rest
    assert len(set(prompts[6:])) == 3
    signal = rows(
        grpo,
        "select round, count(distinct group_id)::int as n from samples where group_std > 0"
        " group by all order by all",
    )
    by_round = [row["n"] for row in signal]
    assert sum(by_round[:2]) < WANTED <= sum(by_round)
    first, second = by_round[0], sum(by_round[:2])
    assert f"generate 0: {first} of 5 groups with signal after round 0: round 1\n" in said
    assert f"generate 0: {second} of 5 groups with signal after round 1: round 2\n" in said
    assert manifest("rollouts")["summary"]["rounds"] == 3
    summary = manifest("rewards")["summary"]
    assert (summary["groups_with_signal"], summary["rounds"]) == (sum(by_round), 3)
    assert len(rows(grpo, "select * from advantages")) == len(rows(grpo, "select * from rewards")) == 18
    # What was there is neither sampled nor scored again: these are the files that the first attempt wrote.
    for output in ("rollouts", "rewards"):
        inodes = {path.stat().st_ino for path in (folder / RUN).glob(f"iteration=000000/{output}/part-*")}
        before = [path.stat().st_ino for path in (folder / RUN).glob(f".trash/*-{output}.*/part-*")]
        assert len(before) == 2 + 4  # of one round, and of two: two shards each
        assert set(before) < inodes
    assert states(grpo) == dict.fromkeys(STAGES, "done")
    do(grpo, "verify", *SETTING)


def test_stage_commands_go_round_by_round_and_end_as_a_run_does(
    rounds: Path, project: Path, grpo: Grpo
) -> None:
    do(grpo, "generate", *SETTING)
    assert manifest("rollouts")["rows"] == 6
    assert states(grpo)["generate"] == "done"  # nothing is known of it yet
    do(grpo, "score", *SETTING)
    lacks = f"{manifest('rewards')['summary']['groups_with_signal']} of 5 groups with signal after round 0"
    assert states(grpo) == {
        "generate": f"partial: {lacks}",
        "score": "done",
        "advantage": "missing",
        "update": "missing",
    }
    code, _, err = grpo("advantage", "--iteration", "0", *SETTING)
    way = "`grpo generate --iteration 0` samples another round, `generate.dynamic_sampling: null` continues"
    way += " with these"
    assert (code, err) == (4, f"error: {RUN}/iteration=000000/rollouts: {lacks}; {way}\n")
    do(grpo, "generate", *SETTING)
    assert states(grpo)["generate"] == "done"
    assert states(grpo)["score"] == "partial: 1 of 2 rounds are scored"
    do(grpo, "verify", *SETTING)
    code, _, err = grpo("advantage", "--iteration", "0", *SETTING)
    way = "`grpo score --iteration 0` scores the others"
    assert (code, err) == (4, f"error: {RUN}/iteration=000000/rewards: 1 of 2 rounds are scored; {way}\n")
    for command in ("score", "generate", "score", "advantage", "update"):
        do(grpo, command, *SETTING)
    assert states(grpo) == dict.fromkeys(STAGES, "done")
    assert crash.contents(project) == crash.contents(rounds)


def test_a_run_goes_on_from_between_the_rounds(rounds: Path, project: Path, grpo: Grpo) -> None:
    for command in ("generate", "score", "generate"):
        do(grpo, command, *SETTING)
    do(grpo, "gc", *SETTING)
    do(grpo, "run", *ONE)
    assert crash.contents(project) == crash.contents(rounds)
    assert "nothing to do" in do(grpo, "run", *ONE)


def test_after_the_last_round_training_goes_on_and_it_is_said(project: Path, grpo: Grpo) -> None:
    few = "generate.dynamic_sampling={min_groups: 6, max_rounds: 2}"  # all six would need signal
    err = do(grpo, "run", "--until", "1", "--set", few)
    signal = manifest("rewards")["summary"]["groups_with_signal"]
    assert signal < 6
    assert (
        f"score 0: {signal} of 6 groups with signal after 2 rounds (generate.dynamic_sampling.max_rounds)"
        in err
    )
    assert manifest("rollouts")["summary"]["rounds"] == 2
    found = json.loads(grpo("status", "--json", "--set", few)[1])["iterations"][0]["stages"]
    assert {stage["state"] for stage in found.values()} == {"done"}


def test_force_makes_all_rounds_again_to_the_same_bytes(rounds: Path, grpo: Grpo) -> None:
    before = manifest("rollouts")
    do(grpo, "generate", "--iteration", "0", "--force", *SETTING)
    after = manifest("rollouts")
    assert (after["ids"], after["attempt"]) == (before["ids"], before["attempt"] + 1)
    assert states(grpo) == dict.fromkeys(STAGES, "done")


def test_rollouts_that_were_lost_are_made_again_with_all_rounds(rounds: Path, grpo: Grpo) -> None:
    before = crash.contents(rounds)
    path = next((RUN / "iteration=000000" / "rollouts").glob("part-00004-*.parquet"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.unlink()
    path.write_bytes(content)
    code, out, _ = grpo("verify", "--discard", *SETTING)
    assert (code, "grpo generate --iteration 0" in out) == (6, True)
    do(grpo, "generate", "--iteration", "0", *SETTING)
    assert states(grpo) == dict.fromkeys(STAGES, "done")
    assert crash.contents(rounds) == before


def test_a_finished_iteration_is_history_whatever_is_configured_later(rounds: Path, grpo: Grpo) -> None:
    more = "generate.dynamic_sampling={min_groups: 9, max_rounds: 4}"
    for setting in (more, "generate.dynamic_sampling=null"):
        _, out, _ = grpo("status", "--json", "--set", setting)
        found = json.loads(out)["iterations"][0]["stages"]
        assert [found[name]["state"] for name in STAGES] == ["changed", "done", "done", "done"]
        assert "nothing to do" in do(grpo, "run", "--until", "1", "--set", setting)


def test_between_rounds_nothing_is_mixed_with_another_configuration(project: Path, grpo: Grpo) -> None:
    for command in ("generate", "score"):
        do(grpo, command, *SETTING)
    code, _, err = grpo("run", *ONE, "--set", "generate.temperature=0.5")
    assert code == 4
    assert "generate of iteration 0 is partial" in err
    assert "and changed (generate.temperature: 1.0 -> 0.5); put that back, or rerun it" in err
    more = "generate.dynamic_sampling={min_groups: 6, max_rounds: 3}"
    code, _, err = grpo("run", "--until", "1", "--set", more)
    assert (code, "generate.dynamic_sampling.min_groups: 5 -> 6" in err) == (4, True), err
    do(grpo, "run", "--until", "1", "--set", "generate.dynamic_sampling=null")  # goes on with what is there
    assert manifest("rollouts")["summary"]["rounds"] == 1
    assert manifest("update")["rows"] > 0
    assert "nothing to do" in do(grpo, "run", *ONE)  # and that is history
    assert manifest("rollouts")["summary"]["rounds"] == 1


def test_a_fork_begins_between_the_rounds(rounds: Path, project: Path, grpo: Grpo) -> None:
    for command in ("generate", "score"):
        do(grpo, command, *SETTING)
    said = do(grpo, "fork", "tiny", "other", "--iteration", "0", *SETTING)
    assert "and of iteration 0 generate, score" in said
    do(grpo, "run", *ONE, "--set", "run=other")
    found = {name.replace("other/", "tiny/"): value for name, value in crash.contents(project).items()}
    expected = crash.contents(rounds)
    assert {name: found[name] for name in expected} == expected
    assert manifest("rollouts")["summary"]["rounds"] == 1  # the run it began as is what it was


def test_more_groups_than_there_can_be_are_refused(project: Path, grpo: Grpo) -> None:
    code, _, err = grpo("run", "--set", "generate.dynamic_sampling={min_groups: 7, max_rounds: 2}")
    assert code == 2
    assert err == (
        "error: pipeline.yaml with --set: generate: dynamic_sampling.min_groups: 7 are more than the 3"
        " groups of prompts_per_iteration times max_rounds 2; lower it, or raise those\n"
    )
