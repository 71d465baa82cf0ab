"""loss.py: worked numbers, and the plain restatement."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import restatement
from tests.restatement import Objective, Response
from torch import Tensor

from grpo.update.loss import (
    MAX_LOG_RATIO,
    Step,
    aggregate_rollouts,
    aggregate_tokens,
    kl_estimate,
    log_ratio,
    policy_loss,
    sampler_weights,
    surrogate,
)

LN2, LN3 = math.log(2), math.log(3)
AGGREGATES = ["sequence_mean", "token_mean", "constant", "sequence_sum"]
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
    found = surrogate(doubles(ratio), doubles(advantage), clip_low, clip_high)
    assert found.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.1, 2.0, 2.0), (1.5, 2.0, 0.0), (0.5, 2.0, 2.0), (1.5, -2.0, -2.0), (0.5, -2.0, 0.0), (1.0, 2.0, 2.0)],
)
def test_gradient_is_zero_where_the_clip_acts(ratio: float, advantage: float, slope: float) -> None:
    ratio_R = doubles(ratio).requires_grad_()
    surrogate(ratio_R, doubles(advantage), 0.2, 0.2).sum().backward()  # type: ignore[no-untyped-call]
    assert ratio_R.grad is not None
    assert ratio_R.grad.item() == slope


# ---- aggregates ----

# Token values 1, 2, 3 | 4; N = 2 rollouts, 4 tokens, max_new_tokens 5.
VALUES, LENGTHS, STEP = doubles(1, 2, 3, 4), lengths(3, 1), Step(2, 4, 5)


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
    alone = doubles(4.0), lengths(1)
    found = [aggregate_tokens(*alone, how, STEP).item() for how in AGGREGATES]
    assert found == [2.0, 1.0, 0.4, 2.0]


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


# ---- the loss, worked ----


def loss_of(
    ratio: str,
    aggregate: str,
    advantages: tuple[float, float] = (1.0, -1.0),
    weights: Tensor | None = None,
) -> float:
    total, _ = policy_loss(
        POLICY,
        OLD,
        doubles(*advantages),
        lengths(2, 1),
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.2,
        aggregate=aggregate,
        step=Step(num_rollouts=2, num_tokens=3, max_new_tokens=4),
        weights_R=weights,
    )
    return float(total)


@pytest.mark.parametrize(
    ("ratio", "aggregate", "expected"),
    [
        # Tokens: min(2, 1.2), min(3, 1.2) | min(-0.5, -0.8)
        ("token", "sequence_mean", -0.2),  # -(2.4 / 2 - 0.8) / 2
        ("token", "token_mean", -1.6 / 3),  # -(2.4 - 0.8) / 3
        ("token", "constant", -0.2),  # -1.6 / (2 * 4)
        ("token", "sequence_sum", -0.8),  # -1.6 / 2
        # Rollouts: min(6, 1.2) | min(-0.5, -0.8)
        ("sequence", "sequence_mean", -0.2),  # -(1.2 - 0.8) / 2
        ("sequence", "sequence_sum", -0.2),
        ("sequence", "constant", -0.2),
        ("sequence", "token_mean", -1.6 / 3),  # -(2 * 1.2 - 0.8) / 3
        ("sequence_mean", "sequence_mean", -0.2),
    ],
)
def test_policy_loss(ratio: str, aggregate: str, expected: float) -> None:
    assert loss_of(ratio, aggregate) == pytest.approx(expected, rel=1e-14)


def test_the_second_advantage_sign() -> None:
    # Advantages -1, 1: tokens min(-2, -1.2), min(-3, -1.2) | min(0.5, 0.8): -(-5 / 2 + 0.5) / 2
    assert loss_of("token", "sequence_mean", (-1.0, 1.0)) == pytest.approx(1.0, rel=1e-14)
    # rollouts min(-6, -1.2) | 0.5: -(-6 + 0.5) / 2
    assert loss_of("sequence", "sequence_sum", (-1.0, 1.0)) == pytest.approx(2.75, rel=1e-14)


@pytest.mark.parametrize("ratio", RATIOS)
def test_responses_of_one_token_are_the_same_for_every_ratio(ratio: str) -> None:
    # d = ln 2, -ln 3: -(min(2, 1.2) + min(-2 / 3, -2 * 0.8)) / 2
    total, ratio_R = policy_loss(
        doubles(LN2 - 1, -LN3 - 1),
        doubles(-1.0, -1.0),
        doubles(1.0, -2.0),
        lengths(1, 1),
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.2,
        aggregate="sequence_mean",
        step=Step(2, 2, 8),
    )
    assert ratio_R.tolist() == pytest.approx([2, 1 / 3], rel=1e-14)
    assert total.item() == pytest.approx(0.2, rel=1e-14)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_advantages_of_zero_give_a_loss_and_a_gradient_of_zero(ratio: str, aggregate: str) -> None:
    policy = POLICY.clone().requires_grad_()
    total, _ = policy_loss(
        policy,
        OLD,
        doubles(0, 0),
        lengths(2, 1),
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.2,
        aggregate=aggregate,
        step=Step(2, 3, 8),
    )
    total.backward()  # type: ignore[no-untyped-call]
    assert policy.grad is not None
    assert total.item() == 0
    assert policy.grad.tolist() == [0, 0, 0]


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


def test_a_weight_is_masked_on_both_sides_and_only_outside() -> None:
    # w = 1 is e^0 exactly; 2 and 1/2 are the ends, reached from the inside and from the outside.
    edge = doubles(0.0, LN2 - 1e-12, -LN2 + 1e-12, LN2 + 1e-12, -LN2 - 1e-12)
    found = sampler_weights(
        edge,
        torch.zeros(5, dtype=torch.float64),
        lengths(5),
        ratio="token",
        correction="mask",
        level="token",
        cap=2.0,
    )
    assert found.tolist() == pytest.approx([1.0, 2.0, 0.5, 0.0, 0.0], rel=1e-11)


@pytest.mark.parametrize(
    ("ratio", "correction", "level", "cap", "expected"),
    [
        # Ratios 2, 3 | 0.5 with A = 1, -1 and clip 0.2: values 1.2, 1.2 | -0.8. Weights 3, 0.4 | 1.1.
        ("token", "truncate", "token", 2.0, -(2.88 / 2 - 0.88) / 2),  # 2 * 1.2 + 0.4 * 1.2; 1.1 * -0.8
        ("token", "mask", "token", 2.0, -(0 - 0.88) / 2),  # 3 > 2 and 0.4 < 1 / 2
        # exp(mean d) = sqrt(1.2) = 1.0954 | 1.1
        ("token", "truncate", "sequence_mean", 1.05, -(1.05 * 1.2 - 1.05 * 0.8) / 2),
        ("token", "mask", "sequence_mean", 1.098, -(math.sqrt(1.2) * 1.2 - 0) / 2),
        # Rollouts: 1.2 | -0.8
        ("sequence", "truncate", "sequence_mean", 1.05, -(1.05 * 1.2 - 1.05 * 0.8) / 2),
        ("sequence", "mask", "sequence_mean", 1.098, -(math.sqrt(1.2) * 1.2 - 0) / 2),
    ],
)
def test_policy_loss_with_a_sampler_correction(
    ratio: str, correction: str, level: str, cap: float, expected: float
) -> None:
    # What a weight of 0 takes out still counts in N = 2.
    sampled = OLD - doubles(3.0, 0.4, 1.1).log()
    correct = sampler_weights(
        OLD, sampled, lengths(2, 1), ratio=ratio, correction=correction, level=level, cap=cap
    )
    assert loss_of(ratio, "sequence_mean", weights=correct) == pytest.approx(expected, rel=1e-14)


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
    policy = [value + draw(st.sampled_from([0.0, 0.5]) | numbers(-1.5, 1.5)) for value in old]
    reference = [value + draw(numbers(-2, 2)) for value in old]
    sampled = [value - draw(st.sampled_from([0.0, 0.005]) | numbers(-1.5, 1.5)) for value in old]
    return Response(advantage, policy, old, reference, [True] * len(old), sampled)


def fitting(objective: Objective) -> Objective:
    """A sequence ratio has one surrogate value per rollout, and so one weight."""
    return objective if objective.ratio == "token" else replace(objective, correction_level="sequence_mean")


objectives = st.builds(
    Objective,
    correction=st.sampled_from(["none", "truncate", "mask"]),
    correction_level=st.sampled_from(["token", "sequence_mean"]),
    correction_cap=st.sampled_from([2.0, 1.3, 1.01]),
    ratio=st.sampled_from(RATIOS),
    clip_low=st.sampled_from([0.2, 0.1, None]),
    clip_high=st.sampled_from([0.2, 0.28, None]),
    aggregate=st.sampled_from(AGGREGATES),
    kl_coefficient=st.sampled_from([0.01, 0.5]),
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
).map(fitting)


def ours(
    rows: list[Response], parts: list[list[int]], objective: Objective
) -> tuple[float, list[list[float]]]:
    """Loss and gradient of `rows`, summed over micro-batches `parts` of row numbers."""
    step = Step(len(rows), sum(len(row.policy) for row in rows), objective.max_new_tokens)
    total = 0.0
    gradient: dict[int, list[float]] = {}
    for part in parts:
        chosen = [rows[i] for i in part]
        policy = doubles(*(x for row in chosen for x in row.policy)).requires_grad_()
        reference = doubles(*(x for row in chosen for x in row.reference))
        lengths_B = lengths(*(len(row.policy) for row in chosen))
        old = doubles(*(x for row in chosen for x in row.old))
        weights_R = None
        if objective.correction != "none":
            weights_R = sampler_weights(
                old,
                doubles(*(x for row in chosen for x in row.sampled)),
                lengths_B,
                ratio=objective.ratio,
                correction=objective.correction,
                level=objective.correction_level,
                cap=objective.correction_cap,
            )
        loss, _ = policy_loss(
            policy,
            old,
            doubles(*(row.advantage for row in chosen)),
            lengths_B,
            ratio=objective.ratio,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            aggregate=objective.aggregate,
            step=step,
            weights_R=weights_R,
        )
        kl = aggregate_tokens(
            kl_estimate(policy, reference, objective.kl_estimator), lengths_B, objective.aggregate, step
        )
        loss = loss + objective.kl_coefficient * kl
        loss.backward()  # type: ignore[no-untyped-call]
        assert policy.grad is not None
        slopes = iter(policy.grad.tolist())
        gradient |= {i: [next(slopes) for _ in rows[i].policy] for i in part}
        total += loss.item()
    return total, [gradient[i] for i in range(len(rows))]


def deviation(found: list[list[float]], expected: list[list[float]]) -> float:
    """||a - b|| / ||b||."""
    a, b = doubles(*(x for row in found for x in row)), doubles(*(x for row in expected for x in row))
    size = float(b.norm())
    return float((a - b).norm()) / (size or 1.0)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(responses(), min_size=1, max_size=5), objective=objectives)
def test_loss_and_gradient_equal_the_restatement(rows: list[Response], objective: Objective) -> None:
    expected = restatement.loss(rows, objective)
    total, gradient = ours(rows, [list(range(len(rows)))], objective)
    assert total == pytest.approx(expected.loss, rel=1e-10, abs=1e-10)
    assert deviation(gradient, expected.gradient) <= 1e-10


@settings(max_examples=50, deadline=None)
@given(data=st.data(), rows=st.lists(responses(), min_size=2, max_size=6), objective=objectives)
def test_any_split_into_micro_batches_gives_the_same(
    data: Any, rows: list[Response], objective: Objective
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1))))
    edges = [0, *cuts, len(rows)]
    parts = [order[a:b] for a, b in pairwise(edges)]
    whole, gradient = ours(rows, [list(range(len(rows)))], objective)
    total, gradients = ours(rows, parts, objective)
    assert total == pytest.approx(whole, rel=1e-10, abs=1e-10)
    assert deviation(gradients, gradient) <= 1e-10


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    ("estimator", "correction"), [("k1", "none"), ("k2", "truncate"), ("k3", "mask"), ("k3", "none")]
)
def test_the_gradient_of_the_restatement_is_that_of_its_loss(
    ratio: str, estimator: str, correction: str
) -> None:
    # Central differences, so that the two sides of the property tests do not share a mistake.
    counts, seen = [True, False, True], [-1.4, -2.0, -0.2]
    rows = [
        Response(0.8, [-1.0, -2.0, -0.3], [-1.1, -2.6, -0.2], [-1.3, -1.9, -0.5], counts, seen),
        Response(-1.2, [-0.7, -1.4], [-0.6, -0.9], [-0.8, -1.1], [True, True], [-0.8, -0.7]),
    ]
    for aggregate in AGGREGATES:
        objective = fitting(
            Objective(
                ratio=ratio,
                aggregate=aggregate,
                kl_estimator=estimator,
                kl_coefficient=0.3,
                correction=correction,
                correction_cap=1.25,
            )
        )
        gradient = restatement.loss(rows, objective).gradient
        for i, row in enumerate(rows):
            for t in range(len(row.policy)):
                ends = []
                for h in (1e-6, -1e-6):
                    moved = [*row.policy[:t], row.policy[t] + h, *row.policy[t + 1 :]]
                    changed = [*rows]
                    changed[i] = replace(row, policy=moved)
                    ends.append(restatement.loss(changed, objective).loss)
                assert gradient[i][t] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-9)
