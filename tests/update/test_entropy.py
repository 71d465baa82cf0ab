"""The weight of the entropy that follows a target: by hand, as TRL has it, and from `updates` alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.update.examples import configuration, make_rollouts, permuted, settings
from tests.update.runs import commit_rollouts, make_run, update

from grpo.config import Config
from grpo.update.entropy import entropy_weight
from grpo.update.learner import Learner
from grpo.update.plan import plan

CONFIG: dict[str, Any] = {
    "entropy_target": 1.0,
    "entropy_coefficient": 0.1,
    "entropy_coefficient_delta": 0.25,
    "entropy_coefficient_max": 0.5,
}


def weights(entropies: list[float | None], **changes: float) -> list[tuple[float, float]]:
    """(weight, applied) of one step more than there are entropies."""
    config = settings(**CONFIG | changes)
    found = [entropy_weight(config, None)]
    for entropy in entropies:
        row = {"entropy": entropy, "entropy_coefficient": found[-1][0]}
        found.append(entropy_weight(config, row))
    return found


def test_it_rises_at_or_below_the_target_and_falls_above_it_within_its_bounds() -> None:
    # 0.1, not applied: nothing was measured. 0.5 <= 1: + 0.25, applied; 1.0 too: 0.6 is over the largest.
    # 1.1: - 0.25, not applied; twice more: -0.25 is under the smallest, 0. At the target it comes back.
    found = weights([0.5, 1.0, 1.1, 1.1, 1.1, 1.0])
    expected = [(0.1, 0), (0.35, 0.35), (0.5, 0.5), (0.25, 0), (0, 0), (0, 0), (0.25, 0.25)]
    for pair, by_hand in zip(found, expected, strict=True):
        assert pair == pytest.approx(by_hand, abs=1e-12)
    assert weights([9.0] * 3, entropy_coefficient_min=0.05)[-1] == (0.05, 0)


def test_a_step_that_took_nothing_says_nothing() -> None:
    assert weights([0.5, None]) == [(0.1, 0), (0.35, 0.35), (0.35, 0)]


def test_a_run_that_had_no_target_before_begins_with_the_coefficient() -> None:
    config = settings(**CONFIG)
    assert entropy_weight(config, {"entropy": 0.5, "entropy_coefficient": None}) == (0.1, 0.1)
    assert entropy_weight(config, {"entropy": 1.5, "entropy_coefficient": None}) == (0.1, 0)


def trained(root: Path, config: Config, start: Path, stops: bool = False) -> list[dict[str, object]]:
    run, rows = make_run(root, config, start, start), []
    learner = Learner(config.update, "cpu")
    for iteration in range(3):
        commit_rollouts(run, iteration, make_rollouts())
        learner = Learner(config.update, "cpu") if stops else learner
        rows += update(run, iteration, learner)
    return rows


def test_each_step_has_the_weight_that_the_steps_before_ask_for(tmp_path: Path, untied: Path) -> None:
    free = configuration(kl_coefficient=0.0, learning_rate=0.02, steps_per_iteration=2)
    measured = [float(str(row["entropy"])) for row in trained(tmp_path / "free", free, untied)]
    target = sorted(measured)[3]  # some are above it, some below
    keys = CONFIG | {"entropy_target": target, "entropy_coefficient": 0.0}
    config = configuration(kl_coefficient=0.0, learning_rate=0.02, steps_per_iteration=2, **keys)
    rows = trained(tmp_path / "target", config, untied)
    assert rows == trained(tmp_path / "stops", config, untied, stops=True)

    # TRL 1.16, GRPOTrainer._compute_loss, in its own words.
    coefficient, last, applied = 0.0, float("inf"), []
    for row in rows:
        assert row["entropy_coefficient"] == pytest.approx(coefficient, abs=1e-12)
        applied.append(coefficient if last <= target else 0.0)
        last = float(str(row["entropy"]))
        coefficient = min(coefficient + 0.25, 0.5) if last <= target else max(coefficient - 0.25, 0.0)
    assert len({*applied}) > 1
    for row, weight in zip(rows, applied, strict=True):
        bonus = float(str(row["policy_loss"])) - float(str(row["loss"]))
        assert (bonus > 1e-6) == (weight > 0)
        # sequence_mean against the mean over tokens: near each other, as these lengths are.
        assert bonus == pytest.approx(weight * float(str(row["entropy"])), rel=0.35, abs=1e-9)


def test_the_rows_it_was_made_from_are_an_input_and_the_column_is_there_only_then(
    tmp_path: Path, untied: Path
) -> None:
    for name, keys in (("plain", {}), ("target", CONFIG)):
        config = configuration(kl_coefficient=0.0, **keys)
        run = make_run(tmp_path / name, config, untied, untied)
        learner = Learner(config.update, "cpu")
        for iteration in range(2):
            commit_rollouts(run, iteration, make_rollouts())
            update(run, iteration, learner)
        assert ("updates@0" in plan(run, 1).inputs) == (name == "target")
        assert "updates@0" not in plan(run, 0).inputs
        assert run.id_of("updates@0") == run.require("update", 0, "").ids["updates"]
        [shown] = run.read("updates", 1)["entropy_coefficient"].to_pylist()
        assert (shown is None) == (name == "plain")
        inputs = run.require("update", 1, "").inputs
        assert inputs.get("updates@0") == (run.id_of("updates@0") if name == "target" else None)


def test_with_a_target_advantages_of_zero_are_read(tmp_path: Path, untied: Path) -> None:
    config = configuration(kl_coefficient=0.0, **CONFIG)
    run = make_run(tmp_path, config, untied, untied)
    nothing = make_rollouts()
    commit_rollouts(run, 0, replace(nothing, advantages=nothing.advantages * 0))
    commit_rollouts(run, 1, permuted(nothing, nothing.keys[:0, 0]))
    learner = Learner(config.update, "cpu")
    [first] = update(run, 0, learner)
    assert (first["skipped"], first["entropy_coefficient"]) == (False, 0.1)
    [second] = update(run, 1, learner)  # without a row there is nothing to read, and the weight goes on
    assert second["skipped"] is True
    assert second["entropy_coefficient"] == pytest.approx(0.35 if first["entropy"] <= 1 else 0.0)
