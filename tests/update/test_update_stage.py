"""The stage on tiny real models: its tables against the plain restatement, and what it commits."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import restatement
from tests.update.examples import (
    CASES,
    CORRECTIONS,
    RARE,
    ROWS,
    all_entropies,
    all_logprobs,
    as_old,
    configuration,
    deviation,
    gradients,
    in_double,
    load,
    make_learner,
    make_rollouts,
    objective_of,
    one_logprobs,
    permuted,
    plain,
    settings,
    weights_of,
)
from tests.update.runs import commit_rollouts, make_run, update

from grpo import tables
from grpo.artifacts import CHECKPOINT, Run
from grpo.config import Config
from grpo.errors import EngineError, UsageError
from grpo.update import outputs, training
from grpo.update.batch import kept_rollouts, minibatches
from grpo.update.learner import Learner


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize(("objective", "old_logprobs", "changes"), CASES)
def test_update_equals_the_plain_restatement(
    tmp_path: Path,
    untied: Path,
    other: Path,
    objective: str,
    old_logprobs: str,
    changes: dict[str, Any],
    epochs: int,
    steps: int,
) -> None:
    rollouts = make_rollouts()
    start = all_logprobs(in_double(untied), rollouts)
    rollouts = replace(rollouts, old_logprobs=as_old(start, 0.2))
    entropies = all_entropies(in_double(untied), rollouts)
    config = configuration(
        objective,
        old_logprobs=old_logprobs,
        epochs=epochs,
        steps_per_iteration=steps,
        max_tokens_per_batch=40,
        learning_rate=0.003,
        kl_coefficient=0.2,
        **changes,
    )
    run = make_run(tmp_path, config, untied, other)
    commit_rollouts(run, 0, rollouts, unkept=permuted(rollouts, np.arange(2)))
    learner = make_learner(untied, config.update, double=True)
    table = update(run, 0, learner)
    stored = run.read("logprobs", 0).to_pylist()
    assert [[row["group_id"], row["sample_id"]] for row in stored] == rollouts.keys[:, 1:].tolist()

    # These are stored in float32; the restatement takes them as stored, once they are known to be right.
    recomputed = [np.array(row["policy_logprobs"]) for row in stored]
    reference = [np.array(row["reference_logprobs"]) for row in stored]
    for ours, theirs in zip(reference, all_logprobs(in_double(other), rollouts), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)

    model = in_double(untied)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.003, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    old = rollouts.old_logprobs if old_logprobs == "sampled" else recomputed
    first_read: dict[int, int] = {}
    corrected = "sampler_correction" in changes
    number = 0
    for epoch in range(epochs):
        for rows in minibatches(rollouts.keys, steps, 0, 0, epoch):
            first_read |= {int(i): number for i in rows if int(i) not in first_read}
            if epoch == 0:
                for i in rows:
                    own = start[i]
                    if old_logprobs == "sampled":  # read by the policy as it is at this step
                        own = one_logprobs(model, rollouts, i).detach().numpy()
                    np.testing.assert_allclose(recomputed[i], own, atol=1e-5)
            # top_entropy goes by the policy before its first step.
            fixed = entropies if config.update.top_entropy is not None else None
            expected = plain(model, rollouts, rows, old, reference, objective_of(config.update), fixed)
            row = table[number]
            # AdamW turns rounding into moves, so later steps are a little further off; and sampler weights,
            # made of stored log-probs, are in float32 from the first step on.
            tolerance = (1e-6 if corrected else 1e-7) if number == 0 else 1e-5
            close = partial(pytest.approx, rel=tolerance, abs=tolerance)
            assert row["loss"] == close(expected.loss)
            assert row["policy_loss"] == close(expected.policy_loss)
            assert row["kl"] == close(expected.kl)
            if config.update.entropy_coefficient:
                rest = row["policy_loss"] + 0.2 * row["kl"] - row["loss"]
                assert rest == close(config.update.entropy_coefficient * expected.entropy)
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients(model).values()))
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
            assert (row["epoch"], row["step"], row["skipped"]) == (epoch, number, False)
            assert (row["rollouts"], row["tokens"]) == (len(rows), rollouts.num_tokens[rows].sum())
            assert (row["mismatch_mean"] is None) == (number > 0)
            optimizer.step()
            number += 1
    assert len(table) == number
    assert deviation(gradients(learner.model), gradients(model)) <= 2e-5
    assert [row["step"] for row in stored] == [first_read[i] for i in range(len(rollouts))]
    rows = minibatches(rollouts.keys, steps, 0, 0, 0)[0]
    own, sampled = [start[i].tolist() for i in rows], [rollouts.old_logprobs[i].tolist() for i in rows]
    by_token = changes.get("sampler_correction_level", "token") == "token"
    cap = changes.get("sampler_correction_cap", 2.0) if by_token else 2.0
    gaps = restatement.mismatch(own, sampled, cap)
    assert table[0]["mismatch_mean"] == pytest.approx(gaps.mean, rel=1e-5)
    assert table[0]["mismatch_max"] == pytest.approx(gaps.maximum, rel=1e-5)
    assert table[0]["mismatch_kl"] == pytest.approx(gaps.kl, rel=1e-4)
    assert table[0]["effective_sample_size"] == pytest.approx(gaps.effective_sample_size, rel=1e-5)
    assert table[0]["over_cap_fraction"] == gaps.over_cap


@pytest.mark.parametrize(("objective", "correction"), CORRECTIONS)
def test_a_correction_changes_loss_gradient_and_its_own_cap_alone(
    tmp_path: Path, untied: Path, other: Path, objective: str, correction: dict[str, Any]
) -> None:
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.3))
    tables_of = []
    for name, keys in (("without", {}), ("with", correction)):
        config = configuration(objective, old_logprobs="recomputed", **keys)
        run = make_run(tmp_path / name, config, untied, other)
        commit_rollouts(run, 0, rollouts)
        tables_of.append(update(run, 0, Learner(config.update, "cpu")))
    [[without], [corrected]] = tables_of
    differing = {name for name in without if without[name] != corrected[name]}
    capped = {"over_cap_fraction"} & differing  # of a cap of its own for tokens
    assert bool(capped) == (correction.get("sampler_correction_level", "token") == "token")
    assert differing - capped == {"loss", "policy_loss", "grad_norm"}
    assert (corrected["ratio_mean"], corrected["ratio_max"]) == (1, 1)
    assert corrected["loss"] == pytest.approx(corrected["policy_loss"] + 0.01 * corrected["kl"], rel=1e-6)


@pytest.mark.parametrize(("objective", "correction"), CORRECTIONS)
def test_a_sampler_equal_to_the_learner_has_nothing_to_correct(
    tmp_path: Path, untied: Path, objective: str, correction: dict[str, Any]
) -> None:
    # At learning rate 0 the weights are exp(0) = 1 in every step: the same table, bit by bit.
    rollouts = make_rollouts()
    plain_learner = make_learner(untied, settings(objective))
    own = plain_learner.policy_logprobs(rollouts, np.arange(ROWS))
    rollouts = replace(rollouts, old_logprobs=[own[i] for i in range(ROWS)])
    found = []
    for name, keys in (("without", {}), ("with", correction)):
        config = configuration(objective, old_logprobs="recomputed", learning_rate=0.0, epochs=2, **keys)
        run = make_run(tmp_path / name, config, untied, untied)
        commit_rollouts(run, 0, rollouts)
        found.append(update(run, 0, Learner(config.update, "cpu")))
    assert found[0] == found[1]
    assert [row["mismatch_max"] for row in found[0]] == [0, None]


def bytes_of(run: Run, iteration: int) -> dict[str, bytes]:
    """Policy and optimiser files of the checkpoint of what an update made."""
    manifest = run.require(CHECKPOINT, iteration, "")
    return {file.name: run.path_of(file, CHECKPOINT, iteration).read_bytes() for file in manifest.files}


@pytest.mark.parametrize("kept", [True, False])
def test_a_step_without_signal_leaves_everything_as_it_is(tmp_path: Path, tied: Path, kept: bool) -> None:
    config = configuration(kl_coefficient=0.0, learning_rate=0.01, weight_decay=0.1)
    run = make_run(tmp_path, config, tied, tied)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(tied), rollouts)))
    commit_rollouts(run, 0, rollouts)
    learner = Learner(config.update, "cpu")
    [row] = update(run, 0, learner)
    assert row["skipped"] is False
    before = bytes_of(run, 0)
    assert before["model.safetensors"] != (tied / "model.safetensors").read_bytes()

    if kept:
        commit_rollouts(run, 1, replace(rollouts, advantages=np.zeros(ROWS)))
    else:
        commit_rollouts(run, 1, permuted(rollouts, np.arange(0)), unkept=permuted(rollouts, np.arange(3)))
    [row] = update(run, 1, learner)
    expected = dict.fromkeys(tables.schema("updates").names)
    expected |= {"iteration": 1, "epoch": 0, "step": 0, "skipped": True, "learning_rate": 0.01}
    expected |= (
        {"rollouts": ROWS, "tokens": int(rollouts.num_tokens.sum())} if kept else {"rollouts": 0, "tokens": 0}
    )
    assert row == expected
    assert bytes_of(run, 1) == before
    assert len(run.read("logprobs", 1)) == 0


def test_only_the_steps_without_signal_are_skipped(tmp_path: Path, tied: Path) -> None:
    config = configuration(kl_coefficient=0.0, steps_per_iteration=5, learning_rate=0.01)
    run = make_run(tmp_path, config, tied, tied)
    rollouts = make_rollouts()
    silent = rollouts.keys[:, 1] % 2 == 1  # groups 1 and 3
    rollouts = replace(rollouts, advantages=np.where(silent, 0.0, rollouts.advantages))
    commit_rollouts(run, 0, rollouts)
    table = update(run, 0, Learner(config.update, "cpu"))
    steps = minibatches(rollouts.keys, 5, 0, 0, 0)
    assert [row["skipped"] for row in table] == [bool(rollouts.keys[rows[0], 1] % 2) for rows in steps]
    assert sum(row["skipped"] for row in table) == 2
    taken = [row["step"] for row in table if not row["skipped"]]
    assert [row["step"] for row in table if row["mismatch_mean"] is not None] == taken[:1]


def test_with_a_kl_term_advantages_of_zero_are_not_skipped(tmp_path: Path, untied: Path, other: Path) -> None:
    config = configuration(kl_coefficient=0.1)
    run = make_run(tmp_path, config, untied, other)
    commit_rollouts(run, 0, replace(make_rollouts(), advantages=np.zeros(ROWS)))
    [row] = update(run, 0, Learner(config.update, "cpu"))
    assert row["skipped"] is False
    assert row["policy_loss"] == 0
    assert row["loss"] == pytest.approx(0.1 * row["kl"], rel=1e-6)
    assert row["kl"] > 0
    assert row["grad_norm"] > 0


def test_steps_are_made_as_they_are_taken(tmp_path: Path, untied: Path) -> None:
    # All of them at once would be 1,000 lists of rows, during which no signal is heard.
    config = configuration(kl_coefficient=0.0, steps_per_iteration=5, epochs=1000)
    steps = training.steps(make_run(tmp_path, config, untied, untied), 0, make_rollouts())
    epoch, rows = next(steps)
    assert epoch == 0
    assert rows.tolist() == minibatches(make_rollouts().keys, 5, 0, 0, 0)[0].tolist()


def test_progress_is_that_of_micro_batches(
    tmp_path: Path, untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    @contextmanager
    def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        assert (title, total, unit) == ("update 0", 2 * ROWS, "rollouts")
        yield counts.append

    config = configuration(kl_coefficient=0.0, epochs=2, max_tokens_per_batch=16)
    rollouts = make_rollouts()
    rollouts.advantages[0] = 0.0  # which is not read
    run = make_run(tmp_path, config, untied, untied)
    commit_rollouts(run, 0, rollouts)
    monkeypatch.setattr(run.console, "progress", progress)
    update(run, 0, Learner(config.update, "cpu"))
    assert sum(counts) == 2 * ROWS
    assert len(counts) > 2 * 2  # more often than once a step


def with_iterations(config: Config, iterations: int) -> Config:
    return config.model_copy(update={"iterations": iterations})


def test_the_learning_rate_of_each_step_is_in_the_table(tmp_path: Path, untied: Path) -> None:
    keys: dict[str, Any] = {
        "schedule": "linear",
        "warmup_steps": 2,
        "learning_rate": 0.01,
        "steps_per_iteration": 3,
    }
    config = with_iterations(configuration(kl_coefficient=0.0, **keys), 2)
    run = make_run(tmp_path, config, untied, untied)
    learner = Learner(config.update, "cpu")
    found = []
    for iteration in range(2):
        commit_rollouts(run, iteration, make_rollouts())
        found += [row["learning_rate"] for row in update(run, iteration, learner)]
        assert learner.optimizer.param_groups[0]["lr"] == found[-1]
    # Up in two steps, then down by a quarter of 0.01 a step, so as to be 0 at the seventh.
    assert found == pytest.approx([0, 0.005, 0.01, 0.0075, 0.005, 0.0025], rel=1e-12)
    commit_rollouts(run, 2, make_rollouts())
    message = (
        r"^update\.schedule: linear reaches 0 after iterations: 2; found iteration 2; raise `iterations`, or"
        r" set schedule: constant$"
    )
    with pytest.raises(UsageError, match=message):
        update(run, 2, learner)


def test_the_first_step_of_a_warm_up_moves_no_weight(tmp_path: Path, untied: Path) -> None:
    config = configuration(kl_coefficient=0.0, warmup_steps=1, learning_rate=0.01, weight_decay=0.1)
    run = make_run(tmp_path, config, untied, untied)
    learner = Learner(config.update, "cpu")
    start = load(untied, torch.float32).state_dict()
    rates = []
    for iteration, moved in enumerate((False, True)):
        commit_rollouts(run, iteration, make_rollouts())
        [row] = update(run, iteration, learner)
        rates.append(row["learning_rate"])
        assert row["grad_norm"] > 0
        same = [torch.equal(tensor, start[name]) for name, tensor in learner.model.state_dict().items()]
        assert all(same) != moved
    assert rates == [0, 0.01]
    assert len(learner.optimizer.state) == len(list(learner.model.parameters()))  # moments from step 0 on


def test_a_process_that_goes_on_compares_the_layout_as_one_that_stays(
    tmp_path: Path, untied: Path, other: Path
) -> None:
    config = configuration(learning_rate=0.01)
    layouts = []
    for name in ("stays", "goes on"):
        run = make_run(tmp_path / name, config, untied, other)
        learner = Learner(config.update, "cpu")
        for iteration in range(2):
            commit_rollouts(run, iteration, make_rollouts())
            if name == "goes on":
                learner = Learner(config.update, "cpu")
            update(run, iteration, learner)
        summary = run.require("update", 1, "").summary
        layouts.append({key: value for key, value in summary.items() if "layout" in key})
    assert layouts[0] == layouts[1]
    assert layouts[0].keys() == {"layout", "policy_layout_difference", "reference_layout_difference"}
    assert layouts[0]["policy_layout_difference"] is None  # the update before read in this layout


def test_logprobs_in_several_shards_are_in_key_order(
    tmp_path: Path, untied: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = make_rollouts()
    config = configuration(steps_per_iteration=3, learning_rate=0.01)  # read in another order than stored
    shards, stored = [], []
    for name, num_rows in (("one", 2048), ("four", 4)):
        monkeypatch.setattr(outputs, "ROWS_PER_SHARD", num_rows)
        run = make_run(tmp_path / name, config, untied, other)
        commit_rollouts(run, 0, rollouts)
        update(run, 0, Learner(config.update, "cpu"))
        files = run.require("update", 0, "").files
        shards.append([file.rows for file in files if file.table == "logprobs"])
        table = run.read("logprobs", 0)
        stored.append(table.to_pylist())
        keys = np.stack([table[key].to_numpy() for key in tables.KEY], axis=1)
        assert keys.tolist() == rollouts.keys.tolist()
    assert shards == [[14], [4, 4, 4, 2]]
    assert stored[0] == stored[1]
    assert {row["step"] for row in stored[0]} == {0, 1, 2}
    assert all(row["reference_logprobs"] is not None for row in stored[0])


def test_nothing_is_committed_after_an_error(tmp_path: Path, untied: Path) -> None:
    config = configuration(kl_coefficient=0.0)
    run = make_run(tmp_path, config, untied, untied)
    commit_rollouts(run, 0, make_rollouts())
    learner = make_learner(untied, config.update)
    with torch.no_grad():
        weights_of(learner)["model.embed_tokens.weight"][RARE] = math.nan
    with pytest.raises(EngineError, match=r"\(0, 1, 1\); nothing was committed$"):
        update(run, 0, learner)
    assert run.manifest("update", 0) is None
    assert learner.holds is None
    [row] = update(run, 0, learner)  # loaded again from disk
    assert row["skipped"] is False


def test_a_step_that_ruins_the_policy_commits_nothing(tmp_path: Path, untied: Path) -> None:
    config = configuration(kl_coefficient=0.0, learning_rate=0.1, weight_decay=1e300)
    run = make_run(tmp_path, config, untied, untied)
    commit_rollouts(run, 0, make_rollouts())
    message = (
        r"^update: the log-probs of the new policy are not finite; lower update\.learning_rate or"
        r" update\.weight_decay; nothing was committed$"
    )
    with pytest.raises(EngineError, match=message) as caught:
        update(run, 0, Learner(config.update, "cpu"))
    assert caught.value.exit_code == 8
    assert run.manifest("update", 0) is None


def test_at_learning_rate_zero_the_mismatch_stays(tmp_path: Path, untied: Path) -> None:
    config = configuration(kl_coefficient=0.0, learning_rate=0.0, epochs=2, max_tokens_per_batch=1)
    run = make_run(tmp_path, config, untied, untied)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts)))
    commit_rollouts(run, 0, rollouts)
    table = update(run, 0, Learner(config.update, "cpu"))
    assert table[0]["mismatch_max"] < 1e-5
    assert table[0]["effective_sample_size"] == pytest.approx(1, abs=1e-9)
    assert [row["loss"] for row in table] == [table[0]["loss"]] * 2
    stored = run.read("logprobs", 0).to_pylist()
    assert len(stored) == ROWS - 1  # without a KL term, the rollout of advantage 0 is not read
    assert {row["step"] for row in stored} == {0}
    assert all(row["reference_logprobs"] is None for row in stored)
    kept = kept_rollouts(run.read("rollouts", 0), run.read("advantages", 0))
    read = kept.num_tokens[kept.advantages != 0]
    assert read.tolist() == [len(row["policy_logprobs"]) for row in stored]
