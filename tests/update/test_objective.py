"""Loss and gradient of a step on tiny real models, against plain separate sequences."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import restatement
from tests.update.examples import (
    CORRECTIONS,
    EOS,
    MASK,
    OBJECTIVES,
    ONE_STEP,
    ROWS,
    all_entropies,
    all_logprobs,
    as_old,
    deviation,
    gradients,
    in_double,
    load,
    make_learner,
    make_rollouts,
    objective_of,
    one_logprobs,
    one_rollout,
    permuted,
    plain,
    settings,
    step_gradient,
)

from grpo.config import surrogates as configured
from grpo.update import objective
from grpo.update.batch import Rollouts
from grpo.update.objective import Stored
from grpo.update.surrogates import CLIPPED, SURROGATES

EXACT = [case for case in ONE_STEP if case[1] == "sampled"]  # what is recomputed is kept in float32
SHARES = ("clip_fraction_low", "clip_fraction_high", "off_policy_fraction", "low_entropy_fraction")
UNREACHED = ("cispo", "scalerl", "dppo")  # whose bounds are a ratio of 5, and 0.2 of probability


@pytest.mark.parametrize("old_logprobs", ["sampled", "recomputed"])
@pytest.mark.parametrize(("objective", "by_length"), [("grpo", True), ("grpo_sequence", False)])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_on_policy_the_gradient_is_reinforce_with_baseline(
    model: str, objective: str, by_length: bool, old_logprobs: str, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(model)
    plain_model = load(checkpoint, torch.float32)
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(plain_model, rollouts)))
    config = settings(objective, old_logprobs=old_logprobs, kl_coefficient=0.0)
    row, found, _ = step_gradient(checkpoint, config, rollouts)

    assert row["ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert row["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert (row["clip_fraction_low"], row["clip_fraction_high"]) == (0, 0)
    if old_logprobs == "recomputed":
        assert (row["ratio_mean"], row["ratio_max"]) == (1, 1)
    assert row["kl"] is None
    for own, sampled in zip(all_logprobs(plain_model, rollouts), rollouts.old_logprobs, strict=True):
        np.testing.assert_allclose(own, sampled, atol=1e-6)

    plain_model.zero_grad()
    for i, advantage in enumerate(rollouts.advantages):
        logprobs = one_logprobs(plain_model, rollouts, i)
        share = 1 / len(rollouts) / (len(logprobs) if by_length else 1)
        (-advantage * share * logprobs.sum()).backward()
    assert deviation(found, gradients(plain_model)) <= 1e-4
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients(plain_model).values()))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("objective", ["grpo", "grpo_sequence"])
def test_kl_of_the_policy_to_itself_is_zero(untied: Path, objective: str, estimator: str) -> None:
    rollouts = replace(make_rollouts(), old_logprobs=as_old(all_logprobs(in_double(untied), make_rollouts())))
    config = settings(objective, kl_estimator=estimator, kl_coefficient=0.5)
    row, found, _ = step_gradient(untied, config, rollouts)
    assert row["kl"] == 0
    assert row["loss"] == row["policy_loss"]
    without, gradient, _ = step_gradient(untied, settings(objective, kl_coefficient=0.0), rollouts)
    # Without a KL term the rollout of advantage 0 takes no forward pass: other batches, other rounding.
    assert row["policy_loss"] == pytest.approx(without["policy_loss"], rel=1e-6)
    if estimator != "k1":  # at d = 0 the gradient of k2 and k3 is 0; that of k1 never is
        assert deviation(found, gradient) <= 1e-5
    else:
        assert deviation(found, gradient) > 1e-2


@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-5), (True, 2e-7)])  # norms are in float32
@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        *((objective, {}) for objective in OBJECTIVES),
        ("grpo", {"aggregate": "token_mean", "kl_importance": True}),
        ("grpo_sequence", {"aggregate": "token_mean"}),
        ("dr_grpo", {"kl_coefficient": 0.1, "entropy_coefficient": 0.1}),
        ("dapo", {"off_policy_mask": 0.01, "top_entropy": 0.3}),
        ("gmpo", {"aggregate": "prompt_mean"}),
        ("gspo", {"off_policy_mask": 0.01}),
    ],
)
def test_loss_and_gradient_do_not_depend_on_how_they_are_computed(
    still: Path, other: Path, objective: str, changes: dict[str, Any], double: bool, tolerance: float
) -> None:
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(still), rollouts), 0.3))
    order = np.random.default_rng(4).permutation(len(rollouts))
    whole = settings(objective, old_logprobs="sampled", kl_estimator="k3", **changes)
    # In double the reference's log-probs are given: it would compute them in float32.
    given = as_old(all_logprobs(in_double(other), rollouts)) if double else None
    row, expected, _ = step_gradient(still, whole, rollouts, given or other, double=double)
    ways: list[tuple[dict[str, Any], Rollouts]] = [
        ({"max_tokens_per_batch": 1}, rollouts),
        ({"max_tokens_per_batch": 20}, rollouts),
        ({"max_tokens_per_batch": 33}, permuted(rollouts, order)),
        ({"prompt_sharing": "off"}, rollouts),
        ({"prompt_sharing": "off", "max_tokens_per_batch": 33}, permuted(rollouts, order)),
        ({"gradient_checkpointing": True}, rollouts),
        ({"gradient_checkpointing": True, "prompt_sharing": "off", "max_tokens_per_batch": 20}, rollouts),
    ]
    largest = 0.0
    for keys, rows in ways:
        config = whole.model_copy(update=keys)
        mine = given and (given if rows is rollouts else [given[i] for i in order])
        again, found, _ = step_gradient(still, config, rows, mine or other, double=double)
        largest = max(largest, deviation(found, expected))
        assert largest <= tolerance, keys
        for name in ("loss", "policy_loss", "kl", "entropy", "ratio_mean", "ratio_max", "grad_norm"):
            close = row[name] if row[name] is None else pytest.approx(row[name], rel=1e-5, abs=1e-6)
            assert again[name] == close, (keys, name)
        for name in SHARES:
            assert again[name] == row[name], (keys, name)
    if objective in ("sapo", "vespo"):
        assert row["clip_fraction_low"] is row["clip_fraction_high"] is None
    else:
        clipped = row["clip_fraction_low"] + row["clip_fraction_high"]
        assert (clipped > 0) == (objective not in UNREACHED)
    for key, name in (("off_policy_mask", "off_policy_fraction"), ("top_entropy", "low_entropy_fraction")):
        assert (row[name] is None) if key not in changes else (0 < row[name] < 1)
    print(f"{objective} {changes or ''} {'float64' if double else 'float32'}: {largest:.1e}")


@pytest.mark.parametrize("kl_coefficient", [None, 0.2])
@pytest.mark.parametrize(("objective", "old_logprobs", "changes"), ONE_STEP)
def test_one_step_equals_the_plain_restatement_closely(
    untied: Path,
    other: Path,
    objective: str,
    old_logprobs: str,
    changes: dict[str, Any],
    kl_coefficient: float | None,
) -> None:
    """kl_coefficient None: the objective's own, which is 0 for most."""
    rollouts = make_rollouts()
    start = all_logprobs(in_double(untied), rollouts)
    rollouts = replace(rollouts, old_logprobs=as_old(start, 0.2))
    keys = changes if kl_coefficient is None else changes | {"kl_coefficient": kl_coefficient}
    config = settings(objective, old_logprobs=old_logprobs, max_tokens_per_batch=40, **keys)
    row, found, stored = step_gradient(untied, config, rollouts, other, double=True)
    read = sorted(stored.policy)
    assert len(read) == (ROWS if config.kl_coefficient or config.entropy_coefficient else ROWS - 1)
    reference = [stored.reference.get(i, start[i]) for i in range(ROWS)]
    model = in_double(untied)
    # pi_old is in float32 either way: the learner's own as it stored them.
    old = rollouts.old_logprobs
    if old_logprobs == "recomputed":
        old = [stored.policy.get(i, start[i]) for i in range(ROWS)]
    expected = plain(model, rollouts, np.arange(ROWS), old, reference, objective_of(config))
    # The weights are made of stored float32 log-probs, in float32.
    tolerance = 1e-6 if "sampler_correction" in changes else 2e-7
    gap = deviation(found, gradients(model))
    print(f"{objective}, pi_old {old_logprobs}, {keys or ''}: {gap:.1e}")
    assert gap <= tolerance
    assert row["loss"] == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
    assert row["kl"] == (pytest.approx(expected.kl, rel=1e-7) if config.kl_coefficient else None)
    entropy = torch.cat([one_rollout(model, rollouts, i)[1] for i in read]).mean().item()
    assert row["entropy"] == pytest.approx(entropy, rel=1e-7)
    if config.off_policy_mask is not None:
        assert row["off_policy_fraction"] == pytest.approx(expected.off_policy * ROWS / len(read)) != 0
    if config.top_entropy is not None:
        kept = [
            entropy >= np.quantile(np.concatenate(all_entropies(model, rollouts)), 1 - config.top_entropy)
            for i, entropy in enumerate(all_entropies(model, rollouts))
            if i in read
        ]
        assert row["low_entropy_fraction"] == pytest.approx(1 - np.concatenate(kept).mean()) != 0
    if config.ratio == "token":  # fractions are of what was read
        share = rollouts.num_tokens.sum() / rollouts.num_tokens[read].sum()
        if config.surrogate in ("sapo", "vespo"):
            assert row["clip_fraction_low"] is row["clip_fraction_high"] is None
            return
        if len(read) == ROWS or config.surrogate != "cispo":  # which counts tokens of advantage 0 too
            assert row["clip_fraction_low"] == pytest.approx(expected.clipped_low * share)
            assert row["clip_fraction_high"] == pytest.approx(expected.clipped_high * share)
        assert (old_logprobs == "sampled") == (expected.clipped_low + expected.clipped_high > 0)


@pytest.mark.parametrize("max_tokens", [1, 40])
@pytest.mark.parametrize(("objective", "old_logprobs", "changes"), EXACT)
def test_where_norms_are_in_double_one_step_equals_the_restatement_to_ten_digits(
    in_layer_norm: Path, objective: str, old_logprobs: str, changes: dict[str, Any], max_tokens: int
) -> None:
    rollouts = make_rollouts()
    start = all_logprobs(in_double(in_layer_norm), rollouts)
    rollouts = replace(rollouts, old_logprobs=as_old(start, 0.2))
    config = settings(objective, old_logprobs=old_logprobs, max_tokens_per_batch=max_tokens, **changes)
    given = as_old(start, 0.1, seed=3)
    row, found, _ = step_gradient(in_layer_norm, config, rollouts, given, double=True)
    model = in_double(in_layer_norm)
    everything = np.arange(ROWS)
    expected = plain(model, rollouts, everything, rollouts.old_logprobs, given, objective_of(config))
    gap = deviation(found, gradients(model))
    print(f"{objective}, {changes or ''}, {max_tokens}: {gap:.1e}")
    assert gap <= 1e-10
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(("objective", "correction"), CORRECTIONS)
def test_a_corrected_gradient_does_not_depend_on_batches_or_order(
    untied: Path, other: Path, objective: str, correction: dict[str, Any]
) -> None:
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.3))
    order = np.random.default_rng(4).permutation(len(rollouts))
    whole = settings(objective, old_logprobs="recomputed", kl_estimator="k3", **correction)
    row, expected, _ = step_gradient(untied, whole, rollouts, other)
    for max_tokens, rows in [(1, rollouts), (20, rollouts), (33, permuted(rollouts, order))]:
        config = whole.model_copy(update={"max_tokens_per_batch": max_tokens})
        again, found, _ = step_gradient(untied, config, rows, other)
        assert deviation(found, expected) <= 1e-5
        assert again["policy_loss"] == pytest.approx(row["policy_loss"], rel=1e-5, abs=1e-6)


def test_a_step_whose_weights_are_all_masked_has_a_policy_gradient_of_zero(untied: Path) -> None:
    rollouts = make_rollouts()
    far = [row - 1 for row in all_logprobs(load(untied, torch.float32), rollouts)]  # w = e, the cap is 1.1
    config = settings(old_logprobs="recomputed", kl_coefficient=0.0, **MASK)
    row, found, _ = step_gradient(untied, config, replace(rollouts, old_logprobs=far))
    assert (row["loss"], row["policy_loss"], row["grad_norm"]) == (0, 0, 0)
    assert not any(gradient.any() for gradient in found.values())
    assert (row["ratio_mean"], row["ratio_max"]) == (1, 1)


def test_a_response_that_is_only_an_end_of_sequence_equal_to_pad_is_learned(untied: Path) -> None:
    # The longest row pads the other three: what stands behind them must not matter.
    whole = make_rollouts()
    assert whole.responses[2].tolist() == [EOS]
    rows = [0, 2, 6, 9]
    rollouts = permuted(whole, np.array(rows))
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(untied), rollouts)))
    _, found, _ = step_gradient(untied, settings(kl_coefficient=0.0), rollouts)
    model = in_double(untied)
    empty = [np.zeros(len(row)) for row in rollouts.old_logprobs]
    none = restatement.Objective(kl_coefficient=0.0)
    plain(model, rollouts, np.arange(4), rollouts.old_logprobs, empty, none)
    assert deviation(found, gradients(model)) <= 1e-4
    # Each of the lone tokens has a gradient: without them it is another one.
    without = permuted(rollouts, np.array([0]))
    _, other_gradient, _ = step_gradient(untied, settings(kl_coefficient=0.0), without)
    assert deviation(found, other_gradient) > 0.1


def test_the_temperature_of_each_row_is_used(untied: Path) -> None:
    rollouts = make_rollouts()
    learner = make_learner(untied, settings())
    found = learner.policy_logprobs(rollouts, np.arange(len(rollouts)))
    expected = all_logprobs(in_double(untied), rollouts)
    for i, row in enumerate(expected):
        np.testing.assert_allclose(found[i], row, atol=2e-6)
    plain_temperature = replace(rollouts, temperatures=np.ones(len(rollouts)))
    cold = learner.policy_logprobs(plain_temperature, np.arange(len(rollouts)))
    differs = [not np.allclose(found[i], cold[i], atol=1e-2) for i in range(len(rollouts))]
    assert differs == [temperature != 1 for temperature in rollouts.temperatures]


def test_a_token_with_a_false_mask_is_read_but_not_learned(untied: Path) -> None:
    rollouts = permuted(make_rollouts(), np.array([1]))
    assert rollouts.masks[0].tolist()[:2] == [False, True]
    config = settings(kl_coefficient=0.0, old_logprobs="recomputed")
    _, found, stored = step_gradient(untied, config, rollouts)
    assert len(stored.policy[0]) == len(rollouts.responses[0]) - 1
    model = in_double(untied)
    (-rollouts.advantages[0] * one_logprobs(model, rollouts, 0).mean()).backward()
    assert deviation(found, gradients(model)) <= 1e-5
    every = replace(rollouts, masks=[np.ones_like(rollouts.masks[0])])
    _, other_gradient, _ = step_gradient(untied, config, every)
    assert deviation(other_gradient, found) > 0.1


@pytest.mark.parametrize("objective", ["dr_grpo", "dapo", "gspo", "cispo"])
def test_advantages_of_zero_take_no_forward_pass_but_count(untied: Path, objective: str) -> None:
    rollouts = make_rollouts()
    silent = np.isin(np.arange(ROWS), [0, 3, 4, 5, 6, 11])  # 3 of group 0, all of group 1 ...
    rollouts = replace(
        rollouts,
        advantages=np.where(silent, 0.0, rollouts.advantages),
        old_logprobs=as_old(all_logprobs(in_double(untied), rollouts), 0.2),
    )
    config = settings(objective, old_logprobs="sampled")
    row, found, stored = step_gradient(untied, config, rollouts)
    assert sorted(stored.policy) == sorted(stored.first_step) == np.flatnonzero(~silent).tolist()
    # Read with the others, they change nothing: their entropy is asked for, at a coefficient that rounds off.
    everything = config.model_copy(update={"entropy_coefficient": 1e-30})
    again, expected, all_of_them = step_gradient(untied, everything, rollouts)
    assert sorted(all_of_them.policy) == list(range(ROWS))
    assert deviation(found, expected) <= 1e-5
    assert row["policy_loss"] == pytest.approx(again["policy_loss"], rel=1e-5)
    # Left out of the step they would count in no denominator: 14 rollouts would be 8.
    signal = permuted(rollouts, np.flatnonzero(~silent))
    _, alone, _ = step_gradient(untied, config, signal)
    tokens = int(signal.num_tokens.sum()) / int(rollouts.num_tokens.sum())
    share = 8 / 14 if objective in ("dr_grpo", "gspo") else tokens
    assert deviation({name: g / share for name, g in found.items()}, alone) <= 1e-5


def test_the_log_probs_that_are_kept_are_those_of_the_first_step() -> None:
    first, again, later = (np.array([value], dtype=np.float32) for value in (-1.0, -2.0, -3.0))
    stored = Stored(policy={1: first})  # recomputed before the first step
    stored.keep({0: first}, 0)
    stored.keep({0: again, 1: later, 2: later}, 1)
    assert {row: values.item() for row, values in stored.policy.items()} == {1: -1, 0: -1, 2: -3}
    assert stored.first_step == {0: 0, 1: 1, 2: 1}


def test_every_surrogate_of_the_configuration_is_known() -> None:
    assert list(SURROGATES) == list(configured.SURROGATES)
    assert set(CLIPPED) == set(configured.READ_BY["clip_low"])  # what reads a clip can say where it acted


def test_the_constants_are_those_of_the_configuration() -> None:
    config = settings("cispo", entropy_coefficient=0.5)
    found = objective.objective_of(config)
    names = [each.name for each in fields(found) if each.name != "own"]
    assert {name: getattr(found, name) for name in names} == {name: getattr(config, name) for name in names}
    assert found.bounds == (float("-inf"), 5.0)  # clip_low null, clip_high 4
    assert found.cap == float("inf")
