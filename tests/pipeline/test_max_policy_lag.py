"""advantage.max_policy_lag: rollouts of a policy that is too old are not trained on, replayed or not."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo
from tests.faults import crash

FOUR = ("--set", "iterations=4")
REPLAY = ("--set", "update.replay_iterations=2")
MOST = ("--set", "advantage.max_policy_lag=1")


def rows(grpo: Grpo, query: str) -> list[dict[str, Any]]:
    code, out, err = grpo("sql", query, "--json")
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)
    return found


def test_what_is_replayed_is_as_young_as_asked_for(project: Path, grpo: Grpo) -> None:
    """Two iterations are replayed, and the older one is two policies behind: as if one were replayed."""
    code, _, err = grpo("run", *FOUR, *REPLAY, *MOST)
    assert code == 0, err
    # Three groups of two; of update 3 those of iteration 1 (policy 1) are stale.
    assert "update 3: 6 replayed rollouts are stale, and left out: their policy is more than 1 behind" in err
    read = rows(grpo, "select distinct update_iteration as u, iteration as i from logprobs order by all")
    assert [(row["u"], row["i"]) for row in read] == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]
    summaries = rows(grpo, "select summary from manifests where stage = 'update' order by iteration")
    assert [json.loads(row["summary"])["stale"] for row in summaries] == [0, 0, 6, 6]
    assert not rows(grpo, "select * from advantages where reason = 'stale'")  # each was fresh when sampled

    code, _, err = grpo("run", *FOUR, "--set", "update.replay_iterations=1", "--set", "run=one")
    assert code == 0, err
    found = crash.contents(project)
    tables = [
        name for name in found if name.startswith("tiny/") and "/update/" in name and ".parquet" in name
    ]
    assert len(tables) == 8
    assert {name: found[name] for name in tables} == {
        name: found[name.replace("tiny/", "one/")] for name in tables
    }


def test_an_update_is_replayed_as_it_was_made(project: Path, grpo: Grpo) -> None:
    assert grpo("run", *FOUR, *REPLAY, *MOST)[0] == 0
    code, out, err = grpo("verify", "--replay", *FOUR, *REPLAY)
    assert code == 0, err
    assert "4 byte-equal" in out


def test_another_age_makes_updates_stale_that_replay(project: Path, grpo: Grpo) -> None:
    assert grpo("run", *FOUR, *REPLAY)[0] == 0
    code, out, err = grpo("status", "--json", *FOUR, *REPLAY, *MOST)
    assert code == 0, err
    changed = [
        {name for name, stage in row["stages"].items() if stage["state"] == "changed"}
        for row in json.loads(out)["iterations"]
    ]
    assert (code, changed) == (0, [{"advantage", "update"}] * 4)


def test_what_was_sampled_ahead_may_be_too_old_when_it_is_trained_on(project: Path, grpo: Grpo) -> None:
    """Iteration 1 is of policy 0, and the lag that it was sampled with is not wanted any more."""
    assert grpo("run", "--until", "1", "--set", "generate.policy_lag=1")[0] == 0
    code, _, err = grpo("generate", "--iteration", "1", "--set", "generate.policy_lag=1")
    assert code == 0, err
    code, _, err = grpo("run", "--set", "advantage.max_policy_lag=0")
    assert code == 0, err
    assert "advantage 1: no rollout is kept (6 stale)" in err
    found = rows(
        grpo,
        "select distinct iteration, advantage, keep, reason, group_size from advantages where iteration = 1",
    )
    expected = {"iteration": 1, "advantage": None, "keep": False, "reason": "stale", "group_size": 2}
    assert found == [expected]
    assert [row["skipped"] for row in rows(grpo, "select skipped from updates order by iteration")] == [
        False,
        True,
    ]
    assert grpo("verify")[0] == 0


def test_any_age_is_in_no_fingerprint(finished: Path, grpo: Grpo) -> None:
    found = rows(grpo, "select config, user_files from manifests where stage in ('advantage', 'update')")
    assert len(found) == 4
    for row in found:
        assert "max_policy_lag" not in str(row["config"])
        assert "stale" not in str(row["user_files"])


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("-1", "expected at least 0, found -1"),
        (
            "1",
            "advantage.max_policy_lag: 1 is less than generate.policy_lag, 2, so every rollout would",
        ),
    ],
)
def test_an_age_that_nothing_can_have_is_refused(
    project: Path, grpo: Grpo, given: str, complaint: str
) -> None:
    code, _, err = grpo("run", "--set", "generate.policy_lag=2", "--set", f"advantage.max_policy_lag={given}")
    assert (code, complaint in err) == (2, True), err
