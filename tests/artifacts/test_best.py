"""Which policy is best, when a run stops, and that the best stays."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo
from tests.faults import crash

from grpo import open as open_run
from grpo.artifacts.best import Best, ends_at

RUN = crash.RUN


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "ends"),
    [
        ([0.1, 0.5, 0.5, 0.4], 2, 0.0, 3),  # equal is not better: two in a row after policy 1
        ([0.1, 0.5, 0.4, 0.6], 2, 0.0, None),
        ([0.5], 1, 0.0, None),  # the first is better than nothing
        ([0.5, 0.5], 1, 0.0, 1),
        ([0.1, 0.2, 0.3, 0.4], 2, 0.15, None),  # 0.3 is above 0.1 by more; 0.4 waits once
        ([0.1, 0.2, 0.25, 0.4], 2, 0.15, 2),
        ([-3.0, -2.0, -2.5, -2.5, 9.0], 2, 0.0, 3),  # what comes later does not undo it
        ([], 1, 0.0, None),
    ],
)
def test_a_run_ends_after_so_many_evaluations_that_are_not_better(
    values: list[float], patience: int, min_delta: float, ends: int | None
) -> None:
    assert ends_at(list(enumerate(values)), patience, min_delta) == ends


KEEP = ("--set", "checkpoints.keep_last=2", "--set", "checkpoints.keep_every=null")
BY_REWARD = ("--set", "stop={metric: reward, patience: 1}")
STILL = ("--set", "update.learning_rate=0")  # every policy is the first: with the same seeds, no better


def succeed(grpo: Grpo, *arguments: str) -> str:
    code, _, err = grpo(*arguments)
    assert code == 0, err
    return err


def status(grpo: Grpo, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(grpo("status", "--json", *options)[1])
    return found


def values_of(grpo: Grpo, metric: str = "reward") -> list[float]:
    """The metric of every policy measured, in order."""
    found = json.loads(grpo("sql", f"select {metric} as value from evals order by iteration", "--json")[1])
    return [row["value"] for row in found]


def with_references(policies: set[int], moves: int | None) -> list[int]:
    return sorted(policies | ({policy - policy % moves for policy in policies} - {0} if moves else set()))


def checkpoints() -> list[int]:
    """Policies that an update wrote and whose weights are there."""
    paths = RUN.glob("iteration=*/checkpoint/policy/model.safetensors")
    return sorted(int(re.findall("=([0-9]+)", str(path))[0]) + 1 for path in paths)


@pytest.mark.parametrize("moves", [None, 3, 4])
def test_the_best_policy_stays_and_one_that_was_goes(
    measured_project: Path, grpo: Grpo, moves: int | None
) -> None:
    """With the policies that are the reference of what stays, and no others."""
    reference = ("--set", f"update.reference_every={moves or 'null'}")
    every = ("--set", "iterations=7", *KEEP, "--set", "stop.metric=reward", *reference)
    for until in range(1, 8):
        # A step in a process of its own prunes twice: behind the update, and as the next begins.
        succeed(grpo, "run", "--until", str(until), *every)
    succeed(grpo, "gc", *every)
    values = values_of(grpo)
    trained = {policy: value for policy, value in enumerate(values) if policy}
    best = max(trained, key=lambda policy: (trained[policy], -policy))
    stay = with_references({best, 6, 7}, moves)
    assert checkpoints() == stay
    found = status(grpo, *every)["best"]
    top = max(range(8), key=lambda policy: (values[policy], -policy))
    assert (found["policy"], found["value"], found["measure"]) == (top, values[top], "reward")
    # In one process each update drops what it moved out, the best of before too.
    shutil.rmtree(RUN)
    succeed(grpo, "run", *every)
    assert values_of(grpo) == values
    assert checkpoints() == stay
    # What goes on from the best has all that it takes.
    succeed(grpo, "fork", "tiny", "other", *every, "--iteration", str(best))
    succeed(grpo, "run", "other", *every, "--until", str(best + 1))
    succeed(grpo, "gc", *every, "--set", "checkpoints.keep_best=false")
    assert checkpoints() == with_references({6, 7}, moves)


def test_a_run_stops_says_why_and_goes_on_when_asked(measured_project: Path, grpo: Grpo) -> None:
    options = ("--set", "iterations=5", *STILL, *BY_REWARD)
    err = succeed(grpo, "run", *options)
    assert "stopped at policy 1: 1 evaluations without more than" in err
    assert "of policy 0; `grpo export tiny --best --out DIR` writes policy 0" in err
    assert not (RUN / "iteration=000001" / "rollouts").exists()
    noted = (RUN / "stopped.json").read_text()
    assert (json.loads(noted)["policy"], json.loads(noted)["best"]["policy"]) == (1, 0)
    assert status(grpo)["stopped"]["policy"] == 1  # also without the configuration that stopped it
    err = succeed(grpo, "run", *options)
    assert "stopped at policy 1" in err
    assert "engine:" not in err  # nothing was opened to find that out
    assert (RUN / "stopped.json").read_text() == noted
    # More patience goes on, to where that ends; policies measured by hand or by --until decide nothing.
    more = (*options[:-1], "stop={metric: reward, patience: 3}")
    assert "stopped at policy 3" in succeed(grpo, "run", *more)
    succeed(grpo, "run", *more, "--set", "stop=null")
    assert not (RUN / "stopped.json").exists()
    assert status(grpo)["stopped"] is None
    assert "5 iterations are complete; nothing to do" in succeed(grpo, "run", *options)


def test_only_the_evaluations_of_the_schedule_decide(measured_project: Path, grpo: Grpo) -> None:
    options = ("--set", "iterations=5", *STILL, *BY_REWARD, "--set", "evaluate.every=2")
    for until in ("1", "2"):
        succeed(grpo, "run", "--until", until, *options)  # policies 0, 1 and 2 are measured
    document = json.loads(grpo("run", "--json", *options)[1])
    assert document["stopped"]["policy"] == 2  # 0 and 2: one without a better
    assert [row["policy"] for row in document["evaluations"]] == [0, 1, 2]


def test_what_was_measured_otherwise_does_not_count(measured_project: Path, grpo: Grpo) -> None:
    options = ("--set", "iterations=3", *STILL, "--set", "stop={metric: reward, patience: 2}")
    succeed(grpo, "run", *options, "--until", "1", "--set", "evaluate.temperature=0.01")
    document = json.loads(grpo("run", "--json", *options)[1])
    # Policies 0 and 1 at another temperature: policy 2 is the first, and policy 3 waits for the first time.
    assert document["stopped"] is None
    assert status(grpo, *options)["best"]["policy"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("stop.metric=pass@4",), "stop.metric: pass@4 is not measured; there are pass@1, pass@2, pass@3"),
        (("stop.metric=rewards.right",), "there are pass@1, pass@2, pass@3, reward, rewards.code"),
        (("stop.metric=kl",), "kl is not measured"),
        (("stop.patience=0",), "stop.patience: expected at least 1"),
        (("stop.min_delta=-1",), "stop.min_delta"),
        (("stop.patience=1", "evaluate=null"), "stop: goes by evaluations, and `evaluate` is not configured"),
    ],
)
def test_a_stop_that_cannot_be_is_refused(
    measured_project: Path, grpo: Grpo, options: tuple[str, ...], message: str
) -> None:
    given = [part for option in options for part in ("--set", option)]
    code, _, err = grpo("run", "--dry-run", *given)
    assert code == 2
    assert message in err


def test_stop_makes_nothing_stale(measured: Path, grpo: Grpo) -> None:
    err = succeed(grpo, "run", "--set", "stop.patience=9", "--set", "stop.min_delta=0.5")
    assert "2 iterations are complete; nothing to do" in err
    states = [stage["state"] for row in status(grpo)["iterations"] for stage in row["stages"].values()]
    assert states == ["done"] * 8


def test_export_best(measured: Path, grpo: Grpo) -> None:
    values = values_of(grpo, "pass_at[1]")
    best = max(range(3), key=lambda policy: (values[policy], -policy))
    code, out, err = grpo("export", "--best", "--out", "best", "--json")
    assert code == 0, err
    assert json.loads(out)["policy"] == best
    assert open_run("artifacts/tiny").best == Best(best, values[best], "pass@1 of code")
    assert f"best: policy {best}, {values[best]:.3f} pass@1 of code" in grpo("status")[1]
    code, _, err = grpo("export", "--best", "--policy", "1", "--out", "other")
    assert (code, "--best and --policy 1 name a policy each" in err) == (2, True)


def test_export_best_needs_an_evaluation(
    complete: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(complete)
    code, _, err = grpo("export", "--best", "--out", str(tmp_path / "best"))
    assert code == 4
    assert "no policy was measured by pass@1; configure `evaluate` and `grpo evaluate --policy N`" in err
