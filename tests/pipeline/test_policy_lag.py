"""generate.policy_lag: which policy samples an iteration, resumable, and said where it shows."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo
from tests.faults import crash

from grpo.artifacts import policy_of
from grpo.config import GenerateConfig
from grpo.generate.plan import past_of

LAG = ("--set", "generate.policy_lag=1")
FOUR = ("--set", "iterations=4")
# Nothing but the last policy is on disk: what an iteration needs, it has in memory.
LAST = ("--set", "checkpoints={every: 100, keep_last: 1}")


def rows(grpo: Grpo, query: str) -> list[dict[str, Any]]:
    code, out, err = grpo("sql", query, "--json")
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)
    return found


def sampled_by(grpo: Grpo) -> list[int]:
    """The policy that sampled each iteration."""
    query = "select distinct iteration, policy_iteration as policy from rollouts order by all"
    found = rows(grpo, query)
    assert [row["iteration"] for row in found] == list(range(len(found)))
    return [row["policy"] for row in found]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_each_iteration_is_sampled_by_the_policy_that_the_lag_says(
    project: Path, grpo: Grpo, lag: int
) -> None:
    code, _, err = grpo("run", *FOUR, *LAST, "--set", f"generate.policy_lag={lag}")
    assert code == 0, err
    assert "rebuilding" not in err
    assert sampled_by(grpo) == [max(0, number - lag) for number in range(4)]
    lags = [row["policy_lag"] for row in rows(grpo, "select policy_lag from iterations order by iteration")]
    assert lags == [min(number, lag) for number in range(4)]
    assert grpo("verify")[0] == 0


def test_what_a_lag_of_one_samples_is_what_the_policy_before_gives(project: Path, grpo: Grpo) -> None:
    """Iterations 0 and 1 are both of policy 0: what is trained on iteration 0 is as without a lag."""
    assert grpo("run", *FOUR, *LAG)[0] == 0
    late = crash.contents(project)
    assert grpo("run", *FOUR, "--set", "run=now")[0] == 0
    now = {name.removeprefix("now/"): digest for name, digest in crash.contents(project).items()}
    first = [name for name in late if name.startswith("tiny/iteration=000000/")]
    assert {name: late[name] for name in first} == {name: now[name.removeprefix("tiny/")] for name in first}
    rollouts = "iteration=000001/rollouts/part-00000.parquet"
    assert late[f"tiny/{rollouts}"] != now[rollouts]


def test_the_mismatch_holds_the_update_between_and_is_no_alarm(project: Path, grpo: Grpo) -> None:
    assert grpo("run", *FOUR, *LAG, "--set", "update.learning_rate=0.1")[0] == 0
    found = rows(grpo, "select iteration, mismatch_mean from iterations order by iteration")
    assert found[0]["mismatch_mean"] < 1e-5
    assert all(row["mismatch_mean"] > 0.05 for row in found[1:])
    code, out, _ = grpo("status", *LAG, "--set", "update.learning_rate=0.1", *FOUR)
    assert (code, "disagree" in out) == (0, False), out


def test_policies_are_measured_as_without_a_lag(measured_project: Path, grpo: Grpo) -> None:
    code, _, err = grpo("run", *FOUR, *LAST, *LAG)
    assert code == 0, err
    assert "rebuilding" not in err
    measured = rows(grpo, "select distinct iteration from evals order by all")
    assert [row["iteration"] for row in measured] == [0, 1, 2, 3, 4]
    assert grpo("run", *FOUR, *LAST, *LAG)[2].endswith("nothing to do\n")


def test_from_does_an_iteration_again_and_what_follows(project: Path, grpo: Grpo) -> None:
    assert grpo("run", *FOUR, *LAG)[0] == 0
    new = ("--set", crash.NEW_REWARD)
    code, _, err = grpo("run", "--yes", "--from", "2", *FOUR, *LAG, *new)
    assert code == 0, err
    assert sampled_by(grpo) == [0, 0, 1, 2]
    code, out, _ = grpo("status", "--json", *FOUR, *LAG, *new)
    states = [stage["state"] for row in json.loads(out)["iterations"][2:] for stage in row["stages"].values()]
    assert (code, states) == (0, ["done"] * 8)


def test_a_lag_that_changes_holds_from_the_next_iteration_on(project: Path, grpo: Grpo) -> None:
    assert grpo("run", "--until", "2", *FOUR)[0] == 0
    code, _, err = grpo("run", *FOUR, *LAG)
    assert code == 0, err
    assert "from iteration 2: generate.policy_lag: added\n" in err
    assert sampled_by(grpo) == [0, 1, 1, 2]
    assert grpo("run", "--set", "iterations=6")[0] == 0
    assert sampled_by(grpo) == [0, 1, 1, 2, 4, 5]


def test_a_query_reads_what_is_there_whatever_runs_beside_it() -> None:
    config = GenerateConfig(policy_lag=2)
    assert [past_of(config, number) for number in (0, 1, 2, 3)] == [range(0), range(0), range(0), range(1)]
    assert [policy_of(number, 0) for number in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            ["generate.dynamic_sampling={min_groups: 2, max_rounds: 2}"],
            "generate: policy_lag: 1 iterations are sampled ahead of their rewards",
        ),
        (["update.old_logprobs=recomputed"], "generate.policy_lag: with update.old_logprobs recomputed"),
    ],
)
def test_what_would_lie_is_refused(project: Path, grpo: Grpo, settings: list[str], complaint: str) -> None:
    given = [part for setting in settings for part in ("--set", setting)]
    code, _, err = grpo("run", *LAG, *given)
    assert (code, complaint in err) == (2, True), err
    correction = ["--set", "update.sampler_correction=truncate"]
    if "recomputed" in complaint:
        assert grpo("run", "--until", "1", *LAG, *given, *correction)[0] == 0
