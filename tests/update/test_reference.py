"""A reference that moves, on tiny real models: which policy it is, and that stopping changes nothing."""

import re
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.update import groups
from tests.update.examples import all_logprobs, as_old, configuration, in_double, load, make_rollouts
from tests.update.runs import commit_rollouts, make_run, update, whole

from grpo.artifacts import ActiveRun, durable_policies, prune
from grpo.config import Config
from grpo.errors import InputError
from grpo.update import stage
from grpo.update.learner import Learner
from grpo.update.parallel import Ranks
from grpo.update.plan import plan

ITERATIONS = 5
LORA = {"rank": 4, "alpha": 8.0}


def contents(run: ActiveRun) -> dict[str, bytes]:
    """Every file of every update but manifests and times; without what the fingerprint adds to a name."""
    outputs = ("update", "checkpoint")
    found = [path for output in outputs for path in run.path.glob(f"iteration=*/{output}/**/*")]
    files = [path for path in found if path.is_file()]
    own = [path for path in files if path.name not in ("manifest.json", "timings.json")]
    names = [re.sub("-[0-9a-f]{8}[.]", ".", str(path.relative_to(run.path))) for path in own]
    assert len(set(names)) == len(own) > ITERATIONS
    return {name: path.read_bytes() for name, path in zip(names, own, strict=True)}


def trained(
    root: Path,
    config: Config,
    start: Path,
    other: Path,
    stops: bool = False,
    learner: Learner | None = None,
    ranks: Ranks | None = None,
) -> ActiveRun:
    """A run of ITERATIONS updates; stops: each in a process of its own, as far as the learner can tell."""
    run, rollouts = make_run(root, config, start, other), make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(start), rollouts), 0.1))
    run.ranks, learner = ranks, learner or Learner(config.update, "cpu", ranks=ranks)
    for iteration in range(ITERATIONS):
        commit_rollouts(run, iteration, rollouts)
        learner = Learner(config.update, "cpu") if stops else learner
        update(run, iteration, learner)
    return run


@pytest.mark.parametrize("changes", [{}, {"lora": LORA}, {"lora": LORA | {"modules_to_save": ["lm_head"]}}])
def test_the_reference_is_the_newest_policy_of_a_multiple(
    tmp_path: Path, untied: Path, other: Path, changes: dict[str, Any]
) -> None:
    config = configuration(reference_every=2, kl_coefficient=0.2, learning_rate=0.01, **changes)
    run = trained(tmp_path, config, untied, other)
    rollouts, found = make_rollouts(), []
    for iteration, number in enumerate((0, 0, 2, 2, 4)):
        with whole(run, number, tmp_path) if number else nullcontext(other) as folder:
            expected = all_logprobs(load(folder, torch.float32), rollouts)
        stored = run.read("logprobs", iteration)["reference_logprobs"].to_pylist()
        for row, values in zip(stored, expected, strict=True):
            np.testing.assert_allclose(row, values, atol=2e-5)
        found.append(np.concatenate(expected))
        manifest = run.require("update", iteration, "")
        name = f"policy@{number}" if number else "reference"
        assert manifest.inputs[name] == run.id_of(name)
        assert ("reference" in manifest.inputs) == (number == 0)
    assert np.abs(found[2] - found[0]).max() > 0.01
    assert np.abs(found[4] - found[2]).max() > 0.01
    # Where the policy has just become the reference, it is at no distance from it before the first step.
    distance = [run.read("updates", iteration)["kl"].to_pylist()[0] for iteration in (3, 4)]
    assert distance[1] == pytest.approx(0, abs=1e-9) != distance[0]


def adapted() -> Config:
    return configuration(reference_every=2, kl_coefficient=0.2, learning_rate=0.01, lora=LORA)


def references(run: ActiveRun) -> list[np.ndarray]:
    """Log-probs of the reference in each iteration."""
    found = [run.read("logprobs", number)["reference_logprobs"].to_pylist() for number in range(ITERATIONS)]
    return [np.concatenate(each) for each in found]


def driver(folder: Path, start: Path, ranks: Ranks) -> list[np.ndarray]:
    tempfile.tempdir = str(folder / "of another machine")  # which is not there for this one
    run = trained(folder / "shared out", adapted(), start, start, ranks=ranks)
    assert not list(run.path.glob(".weights-*"))
    return references(run)


def as_process(rank: int, folder: Path) -> None:
    groups.lead(rank, folder, partial(driver, folder, folder / "model"))


def test_several_processes_read_an_adapters_reference_from_the_run(tmp_path: Path, untied: Path) -> None:
    (tmp_path / "model").symlink_to(untied)
    assert groups.start(as_process, tmp_path) == [0, 0]
    found = torch.load(tmp_path / "0.pt", weights_only=False)
    expected = references(trained(tmp_path / "alone", adapted(), untied, untied))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)
    assert np.abs(found[4] - found[2]).max() > 0.01


@pytest.mark.parametrize("changes", [{}, {"lora": LORA}, {"lora": LORA | {"modules_to_save": ["lm_head"]}}])
def test_a_learner_that_begins_anew_each_iteration_leaves_the_same_bytes(
    tmp_path: Path, untied: Path, changes: dict[str, Any]
) -> None:
    config = configuration(reference_every=2, kl_coefficient=0.2, learning_rate=0.01, **changes)
    runs = [trained(tmp_path / str(stops), config, untied, untied, stops) for stops in (False, True)]
    assert contents(runs[0]) == contents(runs[1])
    # And one that goes back: to an adapter's base, and to what trains whole as it was.
    learner = Learner(config.update, "cpu")
    for name in ("first", "second"):
        run = trained(tmp_path / name, config, untied, untied, learner=learner)
    assert contents(run) == contents(runs[0])


def test_with_a_period_of_the_whole_run_it_is_as_if_it_stayed(tmp_path: Path, untied: Path) -> None:
    runs = [
        trained(tmp_path / str(every), configuration(reference_every=every), untied, untied)
        for every in (None, ITERATIONS)
    ]
    assert contents(runs[0]) == contents(runs[1])


def test_a_reference_that_is_not_on_disk_is_rebuilt(tmp_path: Path, untied: Path) -> None:
    config = configuration(kl_coefficient=0.2, learning_rate=0.01)
    run = trained(tmp_path, config, untied, untied)
    prune(run, keep_last=1)
    assert durable_policies(run) == [0, ITERATIONS]
    moving = config.update.model_copy(update={"reference_every": 3})
    run.config = run.config.model_copy(update={"update": moving})
    rollouts = make_rollouts()
    commit_rollouts(run, ITERATIONS, rollouts)
    assert "policy@3" in plan(run, ITERATIONS).inputs
    stage.check(run, 9, None)
    update(run, ITERATIONS, Learner(moving, "cpu"))
    stored = run.read("logprobs", ITERATIONS)["reference_logprobs"].to_pylist()
    with whole(run, 3, tmp_path) as folder:
        expected = all_logprobs(load(folder, torch.float32), rollouts)
    for row, values in zip(stored, expected, strict=True):
        np.testing.assert_allclose(row, values, atol=2e-5)


def test_a_reference_that_can_be_had_no_more_is_said_before_anything_is_sampled(
    tmp_path: Path, untied: Path
) -> None:
    config = configuration(kl_coefficient=0.2, learning_rate=0.01)
    run = trained(tmp_path, config, untied, untied)
    prune(run, keep_last=1)
    commit_rollouts(run, 1, make_rollouts(seed=7))
    moving = config.update.model_copy(update={"reference_every": 3})
    run.config = run.config.model_copy(update={"update": moving})
    message = (
        "^update.reference_every: policy 3 is the reference of iteration 5; policy 3 is not on disk, and"
        " cannot be rebuilt: update 1 was made from another rollouts@1 than the one that is there"
    )
    with pytest.raises(InputError, match=message):
        stage.check(run, 9, None)
