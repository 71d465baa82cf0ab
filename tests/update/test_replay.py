"""Training on kept rollouts of earlier iterations: against the plain restatement, and what is written."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.update.examples import (
    MAX_NEW_TOKENS,
    ROWS,
    all_logprobs,
    as_old,
    configuration,
    gradients,
    in_double,
    make_learner,
    make_rollouts,
    objective_of,
    permuted,
    plain,
)
from tests.update.runs import commit_rollouts, make_run, update

from grpo.artifacts import ActiveRun
from grpo.config import Config
from grpo.update.batch import Rollouts, longest, minibatches, read_kept
from grpo.update.learner import Learner
from grpo.update.plan import iterations_of
from grpo.update.plan import plan as planned

SETTINGS: dict[str, Any] = {
    "replay_iterations": 1,
    "learning_rate": 0.0,
    "kl_coefficient": 0.2,
    "clip_high": 0.1,
}


def sampled(checkpoint: Path, iteration: int, noise: float) -> Rollouts:
    """Rollouts of an iteration; their old log-probs are `noise` away from those of the checkpoint."""
    rollouts = make_rollouts(seed=iteration)
    rollouts.keys[:, 0] = iteration
    old = as_old(all_logprobs(in_double(checkpoint), rollouts), noise, seed=iteration)
    return replace(rollouts, old_logprobs=old)


def joined(parts: list[Rollouts]) -> Rollouts:
    return Rollouts(
        keys=np.concatenate([part.keys for part in parts]),
        prompts=[row for part in parts for row in part.prompts],
        responses=[row for part in parts for row in part.responses],
        masks=[row for part in parts for row in part.masks],
        old_logprobs=[row for part in parts for row in part.old_logprobs],
        advantages=np.concatenate([part.advantages for part in parts]),
        temperatures=np.concatenate([part.temperatures for part in parts]),
    )


def after(tmp_path: Path, config: Config, untied: Path, other: Path, parts: list[Rollouts]) -> ActiveRun:
    """A run whose iterations before the last one of `parts` are done; at learning rate 0 nothing moves."""
    run = make_run(tmp_path, config, untied, other)
    for iteration, part in enumerate(parts):
        commit_rollouts(run, iteration, part, unkept=permuted(make_rollouts(), np.arange(2)))
        if iteration < len(parts) - 1:
            update(run, iteration, Learner(config.update, "cpu"))
    return run


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("steps", [1, 3])
def test_replay_equals_the_plain_restatement_over_both_iterations(
    tmp_path: Path, untied: Path, other: Path, objective: str, steps: int
) -> None:
    parts = [sampled(untied, 0, 0.5), sampled(untied, 1, 0.05)]
    config = configuration(objective, steps_per_iteration=steps, **SETTINGS)
    run = after(tmp_path, config, untied, other, parts)
    learner = make_learner(untied, config.update, double=True)
    learner.holds = run.id_of("policy@1")
    table = update(run, 1, learner)

    both, model = joined(parts), in_double(untied)
    reference = [row.astype(np.float32) for row in all_logprobs(in_double(other), both)]
    cut = minibatches(both.keys, steps, 0, 1, 0)
    assert len(table) == len(cut) == steps
    assert sum(len(rows) for rows in cut) == 2 * ROWS  # none of either iteration is left out
    for row, rows in zip(table, cut, strict=True):
        expected = plain(model, both, rows, both.old_logprobs, reference, objective_of(config.update))
        assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert row["policy_loss"] == pytest.approx(expected.policy_loss, rel=1e-5, abs=1e-6)
        assert row["kl"] == pytest.approx(expected.kl, rel=1e-5)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients(model).values()))
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert (row["rollouts"], row["tokens"]) == (len(rows), both.num_tokens[rows].sum())
        assert row["iteration"] == 1


def test_a_group_is_never_cut_and_the_same_number_in_another_iteration_is_another_group() -> None:
    parts = [make_rollouts(0), make_rollouts(1)]
    parts[1].keys[:, 0] = 1
    keys = joined(parts).keys
    cut = minibatches(keys, 10, seed=0, iteration=1, epoch=0)
    assert len(cut) == 10  # five groups of each
    assert sorted(len(rows) for rows in cut) == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert all(len(np.unique(keys[rows, :2], axis=0)) == 1 for rows in cut)


def test_the_tables_say_which_iteration_a_rollout_is_of(tmp_path: Path, untied: Path, other: Path) -> None:
    parts = [sampled(untied, 0, 0.5), sampled(untied, 1, 0.05)]
    run = after(tmp_path, configuration(**SETTINGS), untied, other, parts)
    [row] = update(run, 1, Learner(run.config.update, "cpu"))
    stored = run.read("logprobs", 1).to_pylist()
    keys = [[line["iteration"], line["group_id"], line["sample_id"]] for line in stored]
    assert keys == joined(parts).keys.tolist()
    assert {line["update_iteration"] for line in stored} == {1}
    # The noise on what was sampled now is 0.05 a token: 0.05 * sqrt(2 / pi) = 0.04 on average. That on the
    # older rollouts, 0.5, is a ratio that has moved, and no mismatch of sampler and learner.
    assert row["mismatch_mean"] == pytest.approx(0.04, abs=0.01)
    assert row["mismatch_max"] < 0.25
    assert max(line["mismatch"] for line in stored if line["iteration"] == 0) > 0.3


def test_a_first_step_of_older_rollouts_alone_has_no_mismatch(
    tmp_path: Path, untied: Path, other: Path
) -> None:
    empty = permuted(make_rollouts(), np.arange(0))
    parts = [sampled(untied, 0, 0.5), empty]
    config = configuration(**SETTINGS)
    run = after(tmp_path, config, untied, other, parts)
    [row] = update(run, 1, Learner(config.update, "cpu"))
    assert (row["skipped"], row["rollouts"], row["mismatch_mean"]) == (False, ROWS, None)


def test_the_plan_reads_what_is_replayed_and_no_more(tmp_path: Path, untied: Path, other: Path) -> None:
    parts = [sampled(untied, iteration, 0.1) for iteration in range(3)]
    run = after(tmp_path, configuration(**SETTINGS), untied, other, parts)
    assert [list(iterations_of(run, iteration)) for iteration in range(3)] == [[0], [0, 1], [1, 2]]
    tables = [reference for reference in planned(run, 2).inputs if "s@" in reference]
    assert tables == ["rollouts@1", "advantages@1", "rollouts@2", "advantages@2"]
    assert planned(run, 2).inputs["rollouts@1"] == run.id_of("rollouts@1")
    kept = read_kept(run, 2)
    assert kept.keys.tolist() == joined(parts[1:]).keys.tolist()
    np.testing.assert_array_equal(kept.old_logprobs[0], parts[1].old_logprobs[0])
    assert longest(run, 2) == (6, MAX_NEW_TOKENS)
