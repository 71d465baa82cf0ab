"""Policies that are rebuilt: what is accepted, what is not, and what is written of it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.update.examples import all_logprobs, as_old, configuration, in_double, make_rollouts
from tests.update.runs import commit_rollouts, make_run, update

from grpo.artifacts import CHECKPOINT, ActiveRun, durable_policies, is_durable, prune
from grpo.artifacts.manifest import MANIFEST, seal
from grpo.errors import CorruptError, EngineError
from grpo.inspect.policies import describe, line_of
from grpo.update.durable import Checkpoints
from grpo.update.learner import Learner
from grpo.update.policies import Policies, new_learner
from grpo.update.restore import compare


@pytest.fixture
def run(tmp_path: Path, untied: Path) -> ActiveRun:
    """Three updates; only the last policy is on disk, and so is policy 0."""
    config = configuration(learning_rate=0.01)
    found, rollouts = make_run(tmp_path, config, untied, untied), make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.1))
    learner = Learner(config.update, "cpu")
    for iteration in range(3):
        commit_rollouts(found, iteration, rollouts)
        update(found, iteration, learner)
    prune(found, keep_last=1)
    assert durable_policies(found) == [0, 3]
    return found


@pytest.fixture
def other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Update 1 is not what it was: as another processor, or a GPU, may compute it."""

    def differs(run: ActiveRun, manifest: Any, recorded: ActiveRun, learner: Learner) -> Any:
        found = compare(run, manifest, recorded, learner)
        if manifest.iteration != 1:
            return found
        with torch.no_grad():
            next(learner.model.parameters()).mul_(1.0 + 1e-6)
        return replace(found, differing=["weights"], mean=2e-7, accepted=False)

    monkeypatch.setattr("grpo.update.policies.compare", differs)


def weights(learner: Learner) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in learner.model.parameters()])


def test_a_policy_is_rebuilt_from_the_nearest_and_from_what_is_in_memory(run: ActiveRun) -> None:
    policies = Policies(run, new_learner(run))
    policies.hold(2)
    assert policies.learner.holds == run.id_of("policy@2")
    once = weights(policies.learner)
    policies.hold(1)
    policies.hold(2)  # from policy 1, which is in memory
    assert np.array_equal(weights(policies.learner), once)
    assert policies.rebuilt is None
    assert not is_durable(run, 2)  # nothing was written


def test_a_policy_of_other_bits_is_refused(run: ActiveRun, other_bits: None) -> None:
    policies = Policies(run, new_learner(run))
    with pytest.raises(EngineError, match=r"update 1: a replay gives other weights .* --accept-replay"):
        policies.hold(2)
    assert policies.learner.holds is None
    policies.hold(1)  # those before it are what they were
    assert policies.learner.holds == run.id_of("policy@1")


def test_one_that_is_accepted_keeps_its_id_and_the_next_update_says_so(
    run: ActiveRun, other_bits: None
) -> None:
    run.accept_replay = True
    checkpoints = Checkpoints(run)
    policies = Policies(run, new_learner(run), checkpoints)
    policies.make_durable(2)
    assert policies.learner.holds == run.id_of("policy@2")
    assert policies.rebuilt == {"policy": 2, "mean_difference": 2e-7}
    held = weights(policies.learner)
    again = Policies(run, new_learner(run))
    again.hold(2)  # what was written is what was accepted
    assert np.array_equal(weights(again.learner), held)
    checkpoints.close()


def test_a_checkpoint_of_other_weights_than_its_manifest_says_is_damage(run: ActiveRun) -> None:
    manifest = run.require(CHECKPOINT, 2, "")
    changed = manifest.model_copy(update={"summary": {"weights": "0" * 64}})

    (run.folder(CHECKPOINT, 2) / MANIFEST).write_bytes(seal(changed.recorded()))
    policies = Policies(run, new_learner(run))
    with pytest.raises(CorruptError, match="its weights are not those that its manifest says"):
        policies.hold(3)
    assert policies.learner.holds is None


def test_what_the_newest_would_be_rebuilt_from_is_said(run: ActiveRun) -> None:
    assert line_of(describe(run)) == "policies on disk 0, 3"
    prune(run, keep_last=1)

    shutil.rmtree(run.folder(CHECKPOINT, 2))
    found = describe(run)
    assert (found["on_disk"], found["newest"], found["updates"], found["rebuilt"]) == ([0], 3, 3, [])
    assert line_of(found).startswith("policies on disk 0; policy 3 is 3 updates from 0 (about ")
