"""loss.py: worked numbers, and the plain restatement."""

import math
from dataclasses import asdict, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import restatement
from tests.restatement import Objective, Response
from tests.update.losses import (
    aggregate_rollouts,
    aggregate_tokens,
    cispo_surrogate,
    clip_surrogate,
    clipped,
    kl_loss,
    policy_loss,
    sampler_weights,
)
from torch import Tensor

from grpo.config.objectives import OBJECTIVES
from grpo.config.surrogates import SURROGATES
from grpo.models.logprobs import token_logprobs
from grpo.update import given as constants_of
from grpo.update import loss
from grpo.update.given import MAX_LOG_RATIO, Given, Step
from grpo.update.loss import kl_estimate, log_ratio
from grpo.update.objective import batch_loss

LN2, LN3 = math.log(2), math.log(3)
AGGREGATES = ["sequence_mean", "token_mean", "constant", "sequence_sum", "prompt_mean"]
RATIOS = ["token", "sequence", "sequence_mean"]


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# ---- ratios ----

# Two rollouts, of 2 tokens and of 1: d = ln 2, ln 3 | -ln 2.
POLICY = doubles(-1.0 + LN2, -2.0 + LN3, -1.5 - LN2)
OLD = doubles(-1.0, -2.0, -1.5)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ("token", [2.0, 3.0, 0.5]),
        ("sequence", [6.0, 0.5]),  # 2 * 3
        ("sequence_mean", [math.sqrt(6), 0.5]),
    ],
)
def test_ratios(ratio: str, expected: list[float]) -> None:
    assert log_ratio(POLICY, OLD, lengths(2, 1), ratio).exp().tolist() == pytest.approx(expected, rel=1e-14)


# ---- surrogate ----


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_low", "clip_high", "expected"),
    [
        (1.1, 2.0, 0.2, 0.2, 2.2),  # inside: rho A
        (1.5, 2.0, 0.2, 0.2, 2.4),  # min(3.0, 1.2 * 2)
        (0.5, 2.0, 0.2, 0.2, 1.0),  # min(1.0, 0.8 * 2): not clipped below for A > 0
        (1.5, -2.0, 0.2, 0.2, -3.0),  # min(-3.0, -2.4): not clipped above for A < 0
        (0.5, -2.0, 0.2, 0.2, -1.6),  # min(-1.0, -1.6)
        (1.25, 2.0, 0.2, 0.28, 2.5),  # below 1 + clip_high
        (1.5, 2.0, 0.2, 0.28, 2.56),
        (1.5, 2.0, 0.2, None, 3.0),
        (0.5, -2.0, 0.2, None, -1.6),
        (0.5, -2.0, None, 0.2, -1.0),
        (1.5, 2.0, None, 0.2, 2.4),
        (1.5, 2.0, None, None, 3.0),
        (0.5, -2.0, None, None, -1.0),
        (5.0, 0.0, 0.2, 0.2, 0.0),
        (0.5, -2.0, 1.0, 0.0, -1.0),  # a clip of 1 reaches down to ratio 0
        (1.5, 2.0, 1.0, 0.0, 2.0),
    ],
)
def test_surrogate(
    ratio: float, advantage: float, clip_low: float | None, clip_high: float | None, expected: float
) -> None:
    found = clip_surrogate(doubles(ratio), doubles(advantage), clip_low, clip_high)
    assert found.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.1, 2.0, 2.0), (1.5, 2.0, 0.0), (0.5, 2.0, 2.0), (1.5, -2.0, -2.0), (0.5, -2.0, 0.0), (1.0, 2.0, 2.0)],
)
def test_gradient_is_zero_where_the_clip_acts(ratio: float, advantage: float, slope: float) -> None:
    ratio_R = doubles(ratio).requires_grad_()
    clip_surrogate(ratio_R, doubles(advantage), 0.2, 0.2).sum().backward()  # type: ignore[no-untyped-call]
    assert ratio_R.grad is not None
    assert ratio_R.grad.item() == slope


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip", "expected", "slope"),
    [
        (5.0, -2.0, 0.2, -6.0, 0.0),  # min(3 * -2, 1.2 * -2)
        (2.5, -2.0, 0.2, -5.0, -2.0),  # below delta: min(-5.0, -2.4)
        (0.5, -2.0, 0.2, -1.6, 0.0),
        (5.0, 2.0, 0.2, 2.4, 0.0),  # A > 0: 1 + clip_high comes first
        (1.1, 2.0, 0.2, 2.2, 2.0),
        (5.0, -2.0, None, -6.0, 0.0),  # without a clip, delta is the only bound
        (5.0, 2.0, None, 6.0, 0.0),
        (2.5, -2.0, None, -5.0, -2.0),
    ],
)
def test_delta_caps_the_ratio_for_either_sign(
    ratio: float, advantage: float, clip: float | None, expected: float, slope: float
) -> None:
    ratio_R = doubles(ratio).requires_grad_()
    found = clip_surrogate(ratio_R, doubles(advantage), clip, clip, delta=3.0)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert ratio_R.grad is not None
    assert found.item() == pytest.approx(expected, rel=1e-14)
    assert ratio_R.grad.item() == slope


@pytest.mark.parametrize(
    ("clip_low", "clip_high", "weights"),
    [
        (None, 1.5, [2.0, 2.5, 0.5]),  # 3 is clipped to 1 + 1.5
        (0.2, None, [2.0, 3.0, 0.8]),
        (0.2, 0.2, [1.2, 1.2, 0.8]),
        (None, None, [2.0, 3.0, 0.5]),
    ],
)
def test_cispo_weighs_the_log_prob_by_the_clipped_ratio(
    clip_low: float | None, clip_high: float | None, weights: list[float]
) -> None:
    # Ratios 2, 3, 0.5, A = 1, -2, -1, log-probs -1, -2, -1.5: weight * A * logprob, with gradient weight * A.
    ratio_N, logprobs_N = doubles(2.0, 3.0, 0.5).requires_grad_(), doubles(-1.0, -2.0, -1.5).requires_grad_()
    found = cispo_surrogate(ratio_N, logprobs_N, doubles(1.0, -2.0, -1.0), clip_low, clip_high)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert found.tolist() == pytest.approx([-weights[0], 4 * weights[1], 1.5 * weights[2]], rel=1e-14)
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == pytest.approx([weights[0], -2 * weights[1], -weights[2]], rel=1e-14)
    assert ratio_N.grad is None


@pytest.mark.parametrize(
    ("surrogate", "clip_low", "clip_high", "delta", "expected"),
    [
        ("clip", 0.2, 0.2, None, (2, 2)),  # 0.5 with A < 0; 1.5 and 4 with A > 0
        ("clip", 0.2, 0.2, 3.0, (2, 3)),  # and 4 with A < 0
        ("clip", 0.2, None, 3.0, (2, 2)),  # 4 with either sign
        ("clip", None, None, None, (0, 0)),
        ("cispo", 0.2, 0.2, None, (4, 5)),  # 0.5 | 1.5 and 4, with any advantage
        ("cispo", None, 2.0, None, (0, 3)),
    ],
)
def test_clipped_counts_what_the_clip_acted_on(
    surrogate: str, clip_low: float | None, clip_high: float | None, delta: float | None, expected: Any
) -> None:
    ratio_R = doubles(0.5, 0.5, 0.5, 0.5, 1.0, 1.5, 1.5, 4.0, 4.0, 4.0)
    advantages_R = doubles(1.0, -1.0, -1.0, 0.0, 1.0, 1.0, -1.0, 1.0, -1.0, 0.0)
    assert clipped(ratio_R, advantages_R, clip_low, clip_high, surrogate, delta) == expected


# ---- aggregates ----

# Token values 1, 2, 3 | 4; N = 2 rollouts, 4 tokens, max_new_tokens 5.
VALUES, LENGTHS, STEP = doubles(1, 2, 3, 4), lengths(3, 1), Step(2, 4, 5, 1)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sequence_mean", 3.0),  # (6 / 3 + 4 / 1) / 2
        ("token_mean", 2.5),  # 10 / 4
        ("constant", 1.0),  # 10 / (2 * 5)
        ("sequence_sum", 5.0),  # 10 / 2
    ],
)
def test_aggregates_of_tokens(how: str, expected: float) -> None:
    assert aggregate_tokens(VALUES, LENGTHS, how, STEP).item() == expected


@pytest.mark.parametrize(
    ("how", "expected"),
    [("sequence_mean", 3.0), ("sequence_sum", 3.0), ("constant", 3.0), ("token_mean", 2.5)],
)
def test_aggregates_of_rollouts(how: str, expected: float) -> None:
    # Values 2 and 4 of rollouts with 3 tokens and 1: the mean is 3, weighted by length (6 + 4) / 4.
    assert aggregate_rollouts(doubles(2, 4), LENGTHS, how, STEP).item() == expected


def test_denominators_are_those_of_the_whole_step() -> None:
    # A micro-batch with the second rollout alone still divides by 2 rollouts and 4 tokens.
    # Their group has 4 tokens: 4 / 4, of one group.
    alone = doubles(4.0), lengths(1)
    found = [
        [add_up(*alone, how, STEP, lengths(4)).item() for how in AGGREGATES]
        for add_up in (aggregate_tokens, aggregate_rollouts)
    ]
    assert found == [[2.0, 1.0, 0.4, 2.0, 1.0], [2.0, 1.0, 2.0, 2.0, 1.0]]


def test_prompt_mean_weighs_every_prompt_the_same() -> None:
    # Token values 1, 2, 3 | 4 of the first prompt, 6, 8 of the second: (10 / 4 + 14 / 2) / 2.
    step, counts = Step(3, 6, 5, 2), (lengths(3, 1, 2), "prompt_mean")
    found = aggregate_tokens(doubles(1, 2, 3, 4, 6, 8), *counts, step, lengths(4, 4, 2))
    assert found.item() == 4.75
    # Values of rollouts: ((3 * 1 + 1 * 5) / 4 + 2 * 7 / 2) / 2.
    assert aggregate_rollouts(doubles(1, 5, 7), *counts, step, lengths(4, 4, 2)).item() == 4.5


# ---- KL ----


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [LN2, -LN2, 0.0]),
        ("k2", [LN2**2 / 2, LN2**2 / 2, 0.0]),
        ("k3", [0.5 + LN2 - 1, 2 - LN2 - 1, 0.0]),  # exp(-d) + d - 1
    ],
)
def test_kl(estimator: str, expected: list[float]) -> None:
    # d = ln 2, -ln 2, 0
    found = kl_estimate(doubles(-1.0, -3.0, -2.0), doubles(-1.0 - LN2, -3.0 + LN2, -2.0), estimator)
    assert found.tolist() == pytest.approx(expected, rel=1e-14, abs=1e-15)


# POLICY and OLD have token ratios 2, 3 | 0.5 and sequence ratios 6 | 0.5; to this reference, k1 = 1, 2 | 4.
REFERENCE = POLICY - doubles(1.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("importance", "ratio", "value", "gradient"),
    [
        # (3 / 2 + 4) / 2; a token weighs 1/4, 1/4 | 1/2 and the derivative of k1 is 1.
        (False, "token", 2.75, [0.25, 0.25, 0.5]),
        # 2, 6 | 2: (8 / 2 + 2) / 2; weight * rho * (1 + k): 2 * 2 / 4, 3 * 3 / 4 | 0.5 * 5 / 2
        (True, "token", 3.0, [1.0, 2.25, 1.25]),
        # 6, 12 | 2: (18 / 2 + 2) / 2; rho * (weight + sum of weight * k): 6 * (1 / 4 + 3 / 4)
        (True, "sequence", 5.5, [6.0, 6.0, 1.25]),
    ],
)
def test_kl_loss_and_its_gradient_through_the_ratio(
    importance: bool, ratio: str, value: float, gradient: list[float]
) -> None:
    policy = POLICY.clone().requires_grad_()
    kl = kl_loss(
        policy,
        REFERENCE,
        OLD,
        lengths(2, 1),
        estimator="k1",
        importance=importance,
        ratio=ratio,
        aggregate="sequence_mean",
        step=Step(num_rollouts=2, num_tokens=3, max_new_tokens=4),
    )
    kl.backward()  # type: ignore[no-untyped-call]
    assert kl.item() == pytest.approx(value, rel=1e-14)
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx(gradient, rel=1e-13)


# ---- entropy ----


def test_the_entropy_is_aggregated_over_tokens_and_has_a_gradient() -> None:
    # p = 3/4, 1/4: H = ln 4 - 3/4 ln 3, and dH / dlogit = -p (ln p + H) = -+3/16 ln 3. p = 1/2, 1/2: ln 2, 0.
    logits_NV = doubles(LN3, 0.0, 0.0, 0.0, 0.0, LN3).reshape(3, 2).requires_grad_()
    targets_N = torch.zeros(3, dtype=torch.int64)
    _, entropy_N = token_logprobs(logits_NV, targets_N, torch.ones(3), with_entropy=True)
    assert entropy_N is not None
    found = aggregate_tokens(entropy_N, lengths(2, 1), "sequence_mean", Step(2, 3, 4))
    found.backward()  # type: ignore[no-untyped-call]
    skewed, slope = 2 * LN2 - 0.75 * LN3, 3 / 16 * LN3
    assert found.item() == pytest.approx(0.25 * skewed + 0.25 * LN2 + 0.5 * skewed, rel=1e-14)
    assert logits_NV.grad is not None
    expected = [-0.25 * slope, 0.25 * slope, 0.0, 0.0, 0.5 * slope, -0.5 * slope]
    assert logits_NV.grad.flatten().tolist() == pytest.approx(expected, rel=1e-13, abs=1e-15)


# ---- the loss, worked ----


@pytest.mark.parametrize(
    ("ratio", "aggregate", "expected"),
    [
        # Tokens: min(2, 1.2), min(3, 1.2) | min(-0.5, -0.8)
        ("token", "sequence_mean", -0.2),  # -(2.4 / 2 - 0.8) / 2
        ("token", "token_mean", -1.6 / 3),  # -(2.4 - 0.8) / 3
        # Rollouts: min(6, 1.2) | min(-0.5, -0.8)
        ("sequence", "sequence_mean", -0.2),  # -(1.2 - 0.8) / 2
        ("sequence", "token_mean", -1.6 / 3),  # -(2 * 1.2 - 0.8) / 3
    ],
)
def test_policy_loss(ratio: str, aggregate: str, expected: float) -> None:
    total, ratio_R = policy_loss(
        POLICY,
        OLD,
        doubles(1.0, -1.0),
        lengths(2, 1),
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.2,
        aggregate=aggregate,
        step=Step(num_rollouts=2, num_tokens=3, max_new_tokens=4),
    )
    assert total.item() == pytest.approx(expected, rel=1e-14)
    # As they were before the clip.
    assert ratio_R.tolist() == pytest.approx([2, 3, 0.5] if ratio == "token" else [6, 0.5], rel=1e-14)


# ---- sampler correction ----

# Three rollouts, of 2 tokens, 1 and 2: w = 3, 0.4 | 1.005 | 0.5, 2 (d is their logarithm).
# The geometric means: sqrt(1.2) = 1.0954 | 1.005 | 1.
SAMPLED = doubles(-4.0, -2.0, -1.0, -3.0, -1.5)
BEFORE = SAMPLED + doubles(3.0, 0.4, 1.005, 0.5, 2.0).log()
CORRECTED = lengths(2, 1, 2)


def weights_of(ratio: str, correction: str, level: str, cap: float) -> list[float]:
    found: list[float] = sampler_weights(
        BEFORE, SAMPLED, CORRECTED, ratio=ratio, correction=correction, level=level, cap=cap
    ).tolist()
    return found


@pytest.mark.parametrize(
    ("ratio", "correction", "level", "cap", "expected"),
    [
        ("token", "truncate", "token", 1.9, [1.9, 0.4, 1.005, 0.5, 1.9]),  # 3 and 2 are over the cap
        ("token", "truncate", "token", 10.0, [3.0, 0.4, 1.005, 0.5, 2.0]),  # none is: never raised from below
        ("token", "mask", "token", 2.1, [0.0, 0.0, 1.005, 0.5, 2.0]),  # kept from 1 / 2.1 = 0.476 to 2.1
        ("token", "mask", "token", 1.9, [0.0, 0.0, 1.005, 0.0, 0.0]),  # kept from 1 / 1.9 = 0.526 to 1.9
        # One of each rollout, repeated for its tokens.
        ("token", "truncate", "sequence_mean", 1.01, [1.01, 1.01, 1.005, 1.0, 1.0]),
        ("token", "mask", "sequence_mean", 1.01, [0.0, 0.0, 1.005, 1.0, 1.0]),
        ("token", "mask", "sequence_mean", 1.2, [math.sqrt(1.2), math.sqrt(1.2), 1.005, 1.0, 1.0]),
        # One surrogate value per rollout has one weight.
        ("sequence", "truncate", "sequence_mean", 1.01, [1.01, 1.005, 1.0]),
        ("sequence", "mask", "sequence_mean", 1.01, [0.0, 1.005, 1.0]),
        ("sequence_mean", "mask", "sequence_mean", 1.004, [0.0, 0.0, 1.0]),
    ],
)
def test_sampler_weights(ratio: str, correction: str, level: str, cap: float, expected: list[float]) -> None:
    assert weights_of(ratio, correction, level, cap) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("correction", "level", "floor", "expected"),
    [
        ("truncate", "token", 0.6, [1.9, 0.6, 1.005, 0.6, 1.9]),  # 0.4 and 0.5 are raised
        ("truncate", "token", 1.0, [1.9, 1.0, 1.005, 1.0, 1.9]),
        ("mask", "token", 0.45, [0.0, 0.0, 1.005, 0.5, 0.0]),  # kept from 0.45 to 1.9
        ("mask", "token", 0.3, [0.0, 0.4, 1.005, 0.5, 0.0]),
        ("mask", "sequence_mean", 1.0, [math.sqrt(1.2), math.sqrt(1.2), 1.005, 1.0, 1.0]),
    ],
)
def test_a_floor_bounds_the_weight_from_below(
    correction: str, level: str, floor: float, expected: list[float]
) -> None:
    keys = constants_of.Objective(
        sampler_correction=correction,
        sampler_correction_level=level,
        sampler_correction_cap=1.9,
        sampler_correction_floor=floor,
    )
    found = loss.sampler_weights(BEFORE, SAMPLED, CORRECTED, keys)
    assert found.tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_no_gradient_flows_through_the_weight(correction: str) -> None:
    # rho = 1, 1 and w = 1.5, 0.8; A = 2: the gradient of -(w1 rho1 + w2 rho2) * 2 / 2 is -w1 rho1, -w2 rho2.
    # Through w too, it would be twice that.
    policy = doubles(-1.0, -2.0).requires_grad_()
    weights_R = sampler_weights(
        policy,
        policy.detach() - doubles(1.5, 0.8).log(),
        lengths(2),
        ratio="token",
        correction=correction,
        level="token",
        cap=2.0,
    )
    assert not weights_R.requires_grad
    total, ratio_R = policy_loss(
        policy,
        policy.detach(),
        doubles(2.0),
        lengths(2),
        ratio="token",
        clip_low=0.2,
        clip_high=0.2,
        aggregate="sequence_mean",
        step=Step(1, 2, 8),
        weights_R=weights_R,
    )
    total.backward()  # type: ignore[no-untyped-call]
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-1.5, -0.8], rel=1e-14)
    assert ratio_R.tolist() == [1, 1]


@pytest.mark.parametrize("correction", ["truncate", "mask"])
@pytest.mark.parametrize(("ratio", "level"), [("token", "token"), ("sequence", "sequence_mean")])
def test_the_weights_of_a_sampler_equal_to_the_learner_are_exactly_one(
    correction: str, ratio: str, level: str
) -> None:
    same = torch.tensor([-0.1, -7.3, -2.9], dtype=torch.float32)
    found = sampler_weights(
        same, same, lengths(2, 1), ratio=ratio, correction=correction, level=level, cap=1.0001
    )
    assert set(found.tolist()) == {1.0}


@pytest.mark.parametrize(("correction", "over"), [("truncate", 1e9), ("mask", 0.0)])
@pytest.mark.parametrize("cap", [1e9, 2.0])
def test_the_weight_of_a_huge_difference_is_finite(correction: str, over: float, cap: float) -> None:
    found = sampler_weights(
        torch.tensor([-1.0, -1000.0]),
        torch.tensor([-1000.0, -1.0]),
        lengths(1, 1),
        ratio="token",
        correction=correction,
        level="token",
        cap=cap,
    )
    # Bounded to e^20 = 4.9e8, which is less than 1e9, and to e^-20, which is more than 1e-9.
    bounded = [math.exp(MAX_LOG_RATIO), math.exp(-MAX_LOG_RATIO)]
    expected = bounded if cap == 1e9 else [min(over, cap), bounded[1] if correction == "truncate" else 0.0]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


# ---- guards ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("clip", [0.2, None])
def test_huge_log_ratios_give_a_finite_loss_and_gradient(
    dtype: torch.dtype, ratio: str, clip: float | None
) -> None:
    # Four rollouts of two tokens: log-ratios of +1000 and of -1000, each with A > 0 and A < 0.
    old = torch.tensor([-1000.0, -1001.0, -1000.0, -1001.0, -1.0, -1.0, -1.0, -1.0], dtype=dtype)
    policy = torch.tensor(
        [-0.5, -1.0, -0.5, -1.0, -1000.0, -1001.0, -1000.0, -1001.0], dtype=dtype
    ).requires_grad_()
    total, ratio_R = policy_loss(
        policy,
        old,
        torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype),
        lengths(2, 2, 2, 2),
        ratio=ratio,
        clip_low=clip,
        clip_high=clip,
        aggregate="sequence_mean",
        step=Step(4, 8, 8),
    )
    total.backward()  # type: ignore[no-untyped-call]
    assert policy.grad is not None
    assert math.isfinite(total.item())
    assert bool(policy.grad.isfinite().all())
    assert ratio_R.max().item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-6)
    assert ratio_R.min().item() == pytest.approx(math.exp(-MAX_LOG_RATIO), rel=1e-6)


# Log-probs of policy, pi_old and reference as far from one another as they go.
EXTREMES = [(-0.5, -1000.0, -1000.0), (-1000.0, -0.5, -0.5), (-1000.0, -0.5, -2000.0), (-0.5, -0.5, -0.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("delta", [None, 10.0])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_every_objective_is_finite_at_extreme_log_ratios(
    dtype: torch.dtype, name: str, delta: float | None, estimator: str
) -> None:
    # Each twice, with A > 0 and with A < 0; then once more without the bound above.
    objective = restatement.OBJECTIVES[name]
    policy, old, reference = torch.tensor([*EXTREMES, *EXTREMES], dtype=dtype).unbind(dim=1)
    policy = policy.clone().requires_grad_()
    for clip_high in (objective.clip_high, None):
        total, ratio_R = policy_loss(
            policy,
            old,
            torch.tensor([1.0, -1.0], dtype=dtype).repeat_interleave(4),
            lengths(*[1] * 8),
            ratio=objective.ratio,
            clip_low=objective.clip_low,
            clip_high=clip_high,
            aggregate=objective.aggregate,
            step=Step(8, 8, 8, 8),
            surrogate=objective.surrogate,
            delta=delta if objective.surrogate == "clip" else None,
        )
        kl = kl_loss(
            policy,
            reference,
            old,
            lengths(*[1] * 8),
            estimator=estimator,
            importance=True,
            ratio=objective.ratio,
            aggregate=objective.aggregate,
            step=Step(8, 8, 8, 8),
        )
        (slopes,) = torch.autograd.grad(total + kl, policy)
        assert math.isfinite(total.item())
        assert math.isfinite(kl.item())
        assert bool(slopes.isfinite().all())
        assert ratio_R.max().item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("d", [1000.0, -1000.0])
def test_kl_of_a_huge_difference_is_finite_and_pulls_towards_the_reference(estimator: str, d: float) -> None:
    policy = torch.tensor([-1001.0 + max(d, 0)], requires_grad=True)
    kl = kl_estimate(policy, torch.tensor([-1001.0 - min(d, 0)]), estimator)
    kl.sum().backward()  # type: ignore[no-untyped-call]
    assert policy.grad is not None
    assert math.isfinite(kl.item())
    assert math.isfinite(policy.grad.item())
    if estimator != "k1":  # the gradient of k1 is 1 everywhere
        assert policy.grad.item() * d >= 0


def test_inside_the_bound_the_ratio_is_exact() -> None:
    found = log_ratio(doubles(-1.0, -20.5), doubles(-20.5, -1.0), lengths(1, 1), "token")
    assert found.tolist() == [19.5, -19.5]


# ---- against the plain restatement ----


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False).map(lambda value: round(value, 9))


@st.composite
def responses(draw: st.DrawFn) -> Response:
    advantage = draw(st.sampled_from([0.0, 1.0, -1.0]) | numbers(-3, 3))
    old = draw(st.lists(numbers(-8, -0.01), min_size=1, max_size=6))
    # e^1.8 = 6.05 is over every bound.
    moved = [draw(st.sampled_from([0.0, 0.5, 1.8]) | numbers(-1.5, 1.5)) for _ in old]
    policy = [min(value + by, -0.001) for value, by in zip(old, moved, strict=True)]
    reference = [value + draw(numbers(-2, 2)) for value in old]
    sampled = [value - draw(st.sampled_from([0.0, 0.005]) | numbers(-1.5, 1.5)) for value in old]
    entropy = [draw(numbers(0, 5)) for _ in old]
    group = draw(st.integers(0, 2))
    return Response(advantage, policy, old, reference, [True] * len(old), sampled, entropy, group)


def fitting(objective: Objective) -> Objective:
    """What the configuration lets pass: the ratio of a surrogate, one weight for one value per rollout."""
    if objective.surrogate != "clip":
        ratio = SURROGATES[objective.surrogate] or objective.ratio
        objective = replace(objective, ratio=ratio, delta=None)
    if objective.ratio == "token":
        return objective
    return replace(objective, correction_level="sequence_mean", top_entropy=None)


mixtures = st.builds(
    Objective,
    correction=st.sampled_from(["none", "truncate", "mask"]),
    correction_level=st.sampled_from(["token", "sequence_mean"]),
    correction_cap=st.sampled_from([2.0, 1.3, 1.01]),
    ratio=st.sampled_from(RATIOS),
    surrogate=st.sampled_from(["clip", "clip", *SURROGATES]),
    clip_low=st.sampled_from([0.2, 0.1, None]),
    clip_high=st.sampled_from([0.2, 0.28, None]),
    delta=st.sampled_from([None, 1.5, 3.0]),
    aggregate=st.sampled_from(AGGREGATES),
    kl_coefficient=st.sampled_from([0.01, 0.5]),
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
    kl_importance=st.booleans(),
    entropy_coefficient=st.sampled_from([0.0, 0.1]),
    tau_positive=st.sampled_from([1.0, 0.3]),
    tau_negative=st.sampled_from([1.05, 4.0]),
    ratio_cap=st.sampled_from([20.0, 1.3]),
    k_positive=st.sampled_from([2.0, 0.0]),
    lambda_negative=st.sampled_from([2.0, 0.7]),
    off_policy_mask=st.sampled_from([None, 0.0031234567891, 0.2]),
    top_entropy=st.sampled_from([None, 0.2, 0.5, 1.0]),
).map(fitting)
# Those of the configuration have clips of their own, such as the 3e-4 of GSPO.
objectives = mixtures | st.sampled_from(list(restatement.OBJECTIVES.values()))


RENAMED = {name: f"sampler_{name}" for name in ("correction", "correction_level", "correction_cap")}


def constants(objective: Objective) -> constants_of.Objective:
    """The restatement's constants under the names of the configuration; the step has max_new_tokens."""
    values = {RENAMED.get(name, name): value for name, value in asdict(objective).items()}
    values.pop("max_new_tokens")
    return constants_of.Objective(**values)


def ours(
    rows: list[Response], parts: list[list[int]], objective: Objective
) -> tuple[float, list[list[float]]]:
    """Loss and gradient of `rows`, summed over micro-batches `parts` of row numbers.

    A row of the gradient: by each log-prob, then by each entropy.
    """
    tokens_of: dict[int, int] = {}
    for row in rows:
        tokens_of[row.group] = tokens_of.get(row.group, 0) + len(row.policy)
    step = Step(len(rows), sum(tokens_of.values()), objective.max_new_tokens, len(tokens_of))
    bound = None
    if objective.top_entropy is not None:
        bound = np.quantile([x for row in rows for x in row.entropy], 1 - objective.top_entropy)
    keys = constants(objective)
    total = 0.0
    gradient: dict[int, list[float]] = {}
    for part in parts:
        chosen = [rows[i] for i in part]
        policy = doubles(*(x for row in chosen for x in row.policy)).requires_grad_()
        entropy = doubles(*(x for row in chosen for x in row.entropy)).requires_grad_()
        old = doubles(*(x for row in chosen for x in row.old))
        sampled = doubles(*(x for row in chosen for x in row.sampled))
        lengths_B = lengths(*(len(row.policy) for row in chosen))
        weights = (
            loss.sampler_weights(old, sampled, lengths_B, keys) if objective.correction != "none" else None
        )
        given = Given(
            lengths_B,
            doubles(*(row.advantage for row in chosen for _ in row.policy)),
            old,
            doubles(*(x for row in chosen for x in row.reference)),
            weights,
            lengths(*(tokens_of[row.group] for row in chosen)),
            sampled,
            None if bound is None else entropy.detach() < float(bound),
        )
        value, _ = batch_loss(policy, entropy, given, replace(keys, entropy_coefficient=0.0), step)
        bonus = loss.aggregate_tokens(entropy, given, objective.aggregate, step)
        value = (
            value - objective.entropy_coefficient * bonus
        )  # has a gradient where the coefficient is 0, too
        value.backward()  # type: ignore[no-untyped-call]
        assert policy.grad is not None
        assert entropy.grad is not None
        slopes, entropy_slopes = iter(policy.grad.tolist()), iter(entropy.grad.tolist())
        for i in part:
            count = len(rows[i].policy)
            gradient[i] = [*islice(slopes, count), *islice(entropy_slopes, count)]
        total += value.item()
    return total, [gradient[i] for i in range(len(rows))]


def deviation(found: list[list[float]], expected: list[list[float]]) -> float:
    """||a - b|| / ||b||."""
    a, b = doubles(*(x for row in found for x in row)), doubles(*(x for row in expected for x in row))
    size = float(b.norm())
    return float((a - b).norm()) / (size or 1.0)


def test_the_objectives_of_the_restatement_are_those_of_the_configuration() -> None:
    assert list(restatement.OBJECTIVES) == list(OBJECTIVES)
    for name, objective in restatement.OBJECTIVES.items():
        settings = {**OBJECTIVES[name]["update"]}
        settings.pop("old_logprobs")  # whose log-probs Response.old are, no part of the loss
        assert {key: getattr(objective, key) for key in settings} == settings


@settings(max_examples=360, deadline=None)
@given(rows=st.lists(responses(), min_size=1, max_size=5), objective=objectives)
def test_loss_and_gradient_equal_the_restatement(rows: list[Response], objective: Objective) -> None:
    expected = restatement.loss(rows, objective)
    slopes = [[*a, *b] for a, b in zip(expected.gradient, expected.entropy_gradient, strict=True)]
    total, gradient = ours(rows, [list(range(len(rows)))], objective)
    assert total == pytest.approx(expected.loss, rel=1e-10, abs=1e-10)
    assert deviation(gradient, slopes) <= 1e-10


@settings(max_examples=170, deadline=None)
@given(data=st.data(), rows=st.lists(responses(), min_size=2, max_size=6), objective=objectives)
def test_loss_and_gradient_are_the_same_for_any_split_into_micro_batches(
    data: Any, rows: list[Response], objective: Objective
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1), min_size=1)))
    edges = [0, *cuts, len(rows)]
    parts = [order[a:b] for a, b in pairwise(edges)]
    whole, gradient = ours(rows, [list(range(len(rows)))], objective)
    total, gradients = ours(rows, parts, objective)
    assert total == pytest.approx(whole, rel=1e-10, abs=1e-10)
    assert deviation(gradients, gradient) <= 1e-10


COUNTS, SEEN = [True, False, True], [-1.4, -2.0, -0.2]
ROWS = [
    Response(0.8, [-1.0, -2.0, -0.3], [-1.1, -2.6, -0.2], [-1.3, -1.9, -0.5], COUNTS, SEEN, [1.0] * 3),
    Response(-1.2, [-0.7, -1.4], [-0.6, -0.9], [-0.8, -1.1], [True, True], [-0.8, -0.7], [1.0] * 2, 1),
    # Ratios 2.2 and 2.5, 5.5 and 2.3 for the whole.
    Response(-0.9, [-0.4, -1.0], [-1.2, -1.9], [-0.9, -0.7], [True, True], [-1.1, -2.0], [1.0] * 2),
]


def moved(values: list[float], t: int, by: float) -> list[float]:
    return [*values[:t], values[t] + by, *values[t + 1 :]]


def central_difference(objective: Objective, i: int, t: int, *names: str) -> float:
    """Derivative of the restatement's loss by value t of the lists `names` of row i, moved together."""
    ends = []
    for h in (1e-6, -1e-6):
        changed = [*ROWS]
        lists: dict[str, Any] = {name: moved(getattr(ROWS[i], name), t, h) for name in names}
        changed[i] = replace(ROWS[i], **lists)
        ends.append(restatement.loss(changed, objective).loss)
    return (ends[0] - ends[1]) / 2e-6


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("delta", [None, 2.25])
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize(
    ("estimator", "correction"), [("k1", "none"), ("k2", "truncate"), ("k3", "mask"), ("k3", "none")]
)
def test_the_gradient_of_the_restatement_is_that_of_its_loss(
    ratio: str, delta: float | None, importance: bool, estimator: str, correction: str
) -> None:
    # Central differences, so that the two sides of the property tests do not share a mistake.
    for aggregate in AGGREGATES:
        objective = fitting(
            Objective(
                ratio=ratio,
                delta=delta,
                aggregate=aggregate,
                kl_estimator=estimator,
                kl_importance=importance,
                kl_coefficient=0.3,
                correction=correction,
                correction_cap=1.25,
                entropy_coefficient=0.2,
            )
        )
        found = restatement.loss(ROWS, objective)
        for i, row in enumerate(ROWS):
            for t in range(len(row.policy)):
                by_policy = central_difference(objective, i, t, "policy")
                assert found.gradient[i][t] == pytest.approx(by_policy, rel=1e-6, abs=1e-9)
                by_entropy = central_difference(objective, i, t, "entropy")
                assert found.entropy_gradient[i][t] == pytest.approx(by_entropy, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("surrogate", ["sapo", "gmpo"])
@pytest.mark.parametrize("off_policy_mask", [None, 0.05])
def test_the_gradient_of_a_smooth_surrogate_is_that_of_its_loss(
    surrogate: str, off_policy_mask: float | None
) -> None:
    for aggregate in AGGREGATES:
        objective = fitting(
            Objective(
                surrogate=surrogate,
                clip_low=0.4,
                clip_high=0.4,
                aggregate=aggregate,
                off_policy_mask=off_policy_mask,
                top_entropy=0.5,
            )
        )
        found = restatement.loss(ROWS, objective)
        assert (found.off_policy > 0) == (off_policy_mask is not None)
        for i, row in enumerate(ROWS):
            for t in range(len(row.policy)):
                expected = central_difference(objective, i, t, "policy")
                assert found.gradient[i][t] == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("clip_low", [None, 0.2])
@pytest.mark.parametrize("correction", ["none", "truncate"])
@pytest.mark.parametrize("surrogate", ["cispo", "dppo_tv", "dppo_kl", "vespo"])
def test_the_gradient_of_a_weighted_log_prob_is_that_of_its_loss_at_a_constant_weight(
    clip_low: float | None, correction: str, surrogate: str
) -> None:
    for aggregate in AGGREGATES:
        objective = Objective(
            surrogate=surrogate, clip_low=clip_low, clip_high=1.3, aggregate=aggregate, correction=correction
        )
        gradient = restatement.loss(ROWS, objective).gradient
        for i, row in enumerate(ROWS):
            for t in range(len(row.policy)):
                # pi_old and the sampler move along, so that neither ratio nor weight does.
                expected = central_difference(objective, i, t, "policy", "old", "sampled")
                assert gradient[i][t] == pytest.approx(expected, rel=1e-6, abs=1e-9)
