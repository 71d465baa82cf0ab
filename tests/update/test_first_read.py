"""The first log-probs of an update against the sampler's: what may be, and what an engine did wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Grpo

from grpo.artifacts import ActiveRun
from grpo.config import load as load_config
from grpo.console import Console
from grpo.errors import EngineError
from grpo.generate.weight_sync import WeightSync
from grpo.models.weights import Weights
from grpo.update import first_read
from grpo.update.batch import Rollouts, read_kept
from grpo.update.first_read import FirstRead, changes_distribution, limit_of, tolerance_of

ITERATION = 1


@pytest.fixture
def run(finished: Path) -> ActiveRun:
    """A run of two iterations; update 0 had a mismatch of some 1e-7."""
    return ActiveRun(Path("artifacts"), load_config(Path("pipeline.yaml")), Path(), Console(quiet=True))


def shifted(rollouts: Rollouts, by: float) -> dict[int, np.ndarray]:
    return {row: old + np.float32(by) for row, old in enumerate(rollouts.old_logprobs)}


def test_the_first_log_probs_may_be_ten_tolerances_apart(run: ActiveRun) -> None:
    rollouts = read_kept(run, ITERATION)
    FirstRead(run, ITERATION, rollouts, "float32")(shifted(rollouts, -9e-4))
    with pytest.raises(EngineError) as caught:
        FirstRead(run, ITERATION, rollouts, "float32")(shifted(rollouts, -1.1e-3))
    assert (str(caught.value), caught.value.exit_code) == (
        "update 1: the first log-probs are 1.1e-03 nats per token from what the rollouts were sampled with,"
        " at most 1.0e-03 is right: the engine had other weights, or kept a cache of them; `grpo doctor"
        " --model` measures it; `grpo generate --iteration 1 --force` and `grpo run --from 1` sample again;"
        " nothing was committed",
        8,
    )
    with pytest.raises(EngineError, match=r"the first log-probs are nan nats per token"):
        FirstRead(run, ITERATION, rollouts, "float32")(shifted(rollouts, float("nan")))


def test_it_compares_once(run: ActiveRun) -> None:
    rollouts = read_kept(run, ITERATION)
    compare = FirstRead(run, ITERATION, rollouts, "float32")
    compare(shifted(rollouts, 0.0))
    compare(shifted(rollouts, -1.0))  # a later micro-batch: by then the weights may have moved


def test_older_rollouts_are_passed_over(run: ActiveRun) -> None:
    rollouts = read_kept(run, ITERATION)
    keys = rollouts.keys.copy()
    keys[0, 0] = 0
    older = replace(rollouts, keys=keys)
    compare = FirstRead(run, ITERATION, older, "float32")
    far = shifted(rollouts, -1.0)
    compare({0: far[0]})  # of iteration 0
    with pytest.raises(EngineError):
        compare({0: rollouts.old_logprobs[0], 1: far[1]})


@pytest.mark.parametrize("because", ["another policy", "another distribution"])
def test_what_was_sampled_otherwise_is_not_compared(
    run: ActiveRun, monkeypatch: pytest.MonkeyPatch, because: str
) -> None:
    rollouts, manifest = read_kept(run, ITERATION), run.manifest("rollouts", ITERATION)
    assert manifest is not None
    changed = (
        manifest.model_copy(update={"inputs": manifest.inputs | {"policy@1": "0" * 64}})
        if because == "another policy"
        else manifest.model_copy(
            update={"config": {"generate": manifest.config["generate"] | {"top_p": 0.9}}}
        )
    )
    with monkeypatch.context() as patch:
        patch.setattr(run, "require", lambda *_: changed)
        FirstRead(run, ITERATION, rollouts, "float32")(shifted(rollouts, -1.0))
    with pytest.raises(EngineError):
        FirstRead(run, ITERATION, rollouts, "float32")(shifted(rollouts, -1.0))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"top_p": 1.0, "top_k": None, "min_p": 0.0, "repetition_penalty": 1.0}, False),
        ({"temperature": 0.3, "stop": ["x"]}, False),
        ({"top_p": 0.99}, True),
        ({"top_k": 50}, True),
        ({"min_p": 0.01}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"structured_outputs": {"regex": "a"}}, True),
    ],
)
def test_which_settings_change_the_distribution(changes: dict[str, Any], expected: bool) -> None:
    assert changes_distribution(changes) is expected


@pytest.mark.parametrize(
    ("summary", "learner", "expected"),
    [
        ({"precision": "float32", "weight_check_difference": 1e-6}, "float32", 1e-4),
        ({"precision": "float32", "weight_check_difference": None}, "float32", 1e-4),
        ({"precision": "bfloat16", "weight_check_difference": 0.01}, "float32", 0.03),  # 3 x 0.01
        ({"precision": "bfloat16", "weight_check_difference": 1e-6}, "float32", 1e-4),
        ({"precision": "bfloat16", "weight_check_difference": None}, "float32", None),
        ({"precision": None, "weight_check_difference": None}, "float32", None),
        ({"precision": "float32", "weight_check_difference": 1e-6}, "bfloat16", None),
    ],
)
def test_what_the_weight_check_let_pass(
    run: ActiveRun, summary: dict[str, Any], learner: str, expected: float | None
) -> None:
    manifest = run.manifest("rollouts", ITERATION)
    assert manifest is not None
    assert tolerance_of(manifest.model_copy(update={"summary": summary}), learner) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tolerance", "usual", "expected"),
    [
        (1e-4, None, 1e-3),  # 10 x 1e-4
        (1e-4, 1e-6, 1e-3),
        (1e-4, 1e-2, 5e-2),  # 5 x 1e-2
        (None, 1e-2, 5e-2),
        (None, 1e-7, 1e-3),  # never less than float32 may be apart
        (None, None, float("inf")),
    ],
)
def test_the_limit(tolerance: float | None, usual: float | None, expected: float) -> None:
    assert limit_of(tolerance, usual) == pytest.approx(expected)


def test_what_is_usual_is_the_median_of_the_updates_before(
    run: ActiveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = run.manifest("update", 0)
    assert update is not None
    # Of 30 updates the last 20 count, of which numbers 10 to 29 have 10e-3 to 29e-3, and one has none.
    means = [None if number == 20 else number / 1000 for number in range(30)]
    summary = {"precision": "float32"}
    made = [update.model_copy(update={"summary": {"mismatch_mean": mean, **summary}}) for mean in means]
    monkeypatch.setattr(run, "manifest", lambda _, number: made[number])
    kind = ("float32", "float32", "float32")
    assert first_read._usual(run, 30, kind) == 0.019  # the middle of 10..19, 21..29
    assert first_read._usual(run, 0, kind) is None
    for other in (
        ("bfloat16", *kind[1:]),
        ("float32", "bfloat16_master", "float32"),
        (*kind[:2], "bfloat16"),
    ):
        assert first_read._usual(run, 30, other) is None  # rounding is another there


def test_another_precision_is_no_other_policy(finished: Path, grpo: Grpo) -> None:
    for settings in (["update.precision=bfloat16"], ["update.precision=float32"]):
        until = 3 if "bfloat16" in settings[0] else 4
        code, _, err = grpo("run", "--until", str(until), "--set", settings[0])
        assert code == 0, err
    code, _, err = grpo("run", "--until", "5", "--set", "update.weights=bfloat16_master")
    assert code == 0, err


def test_rollouts_of_the_policy_before_are_found_before_a_gradient(
    project: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that stays at policy 0, and a weight check that would not see it."""

    def stale(sync: WeightSync, policy_id: str, source: Path | Weights, *_: object) -> float:
        sync.engine.load(Path("model"))
        sync.holds = policy_id
        return 0.0

    monkeypatch.setattr(WeightSync, "bring", stale)
    code, _, err = grpo("run")
    assert code == 8
    assert err.splitlines()[-1].startswith("error: update 1: the first log-probs are ")
    assert Path("artifacts/tiny/iteration=000000/update/manifest.json").is_file()
    assert not Path("artifacts/tiny/iteration=000001/update").exists()


def test_a_replay_does_not_compare(finished: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was committed was compared then; on other hardware it would be compared with that hardware."""

    def refuse(*_: object) -> None:
        raise AssertionError("compared")

    monkeypatch.setattr(FirstRead, "__call__", refuse)
    code, _, err = grpo("verify", "--replay")
    assert code == 0, err
    with pytest.raises(AssertionError, match="compared"):
        grpo("update", "--iteration", "1", "--force")
