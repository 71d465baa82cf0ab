"""surrogates.py: numbers worked out by hand, gradients by differences, guards, and what masks leave."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.config.surrogates import SURROGATES as CONFIGURED
from grpo.update.given import MAX_LOG_RATIO, Given, Objective, Step
from grpo.update.loss import clipped, log_ratio, policy_loss
from grpo.update.surrogates import CLIPPED, SURROGATES

LN2, LN3 = math.log(2), math.log(3)
UNBOUND: dict[str, Any] = {"clip_low": None, "clip_high": None}


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def objective(surrogate: str, **keys: Any) -> Objective:
    ratio = CONFIGURED[surrogate] or "token"
    return Objective(**{"surrogate": surrogate, "ratio": ratio, **keys})


def evaluated(
    keys: Objective, policy: list[float], old: list[float], advantages: list[float], lengths: list[int]
) -> tuple[list[float], list[float]]:
    """The values, and the derivative of their sum by each log-prob."""
    logprobs_N = doubles(*policy).requires_grad_()
    given = Given(torch.tensor(lengths), doubles(*advantages), doubles(*old))
    ratio_R = log_ratio(logprobs_N, given.old_logprobs_N, given.lengths_B, keys.ratio).exp()
    value_R = SURROGATES[keys.surrogate](ratio_R, logprobs_N, given, keys)
    [slopes_N] = torch.autograd.grad(value_R.sum(), logprobs_N)
    return value_R.tolist(), slopes_N.tolist()


def sides(
    keys: Objective, policy: list[float], old: list[float], advantages: list[float], lengths: list[int]
) -> tuple[list[bool], list[bool]]:
    logprobs_N, lengths_B = doubles(*policy), torch.tensor(lengths)
    given = Given(lengths_B, doubles(*advantages), doubles(*old))
    found = clipped(
        log_ratio(logprobs_N, given.old_logprobs_N, lengths_B, keys.ratio).exp(), logprobs_N, given, keys
    )
    assert found is not None
    return found[0].tolist(), found[1].tolist()


# ---- worked numbers ----


def test_sapo_fades_as_the_ratio_leaves_one() -> None:
    # rho = 2, A = 3, tau = 1: 4 sigmoid(1) * 3, slope 4 s (1 - s) rho A.
    # rho = 1, A = -2, tau = 2: 4 / 2 * 0.5 * -2.
    s = 1 / (1 + math.exp(-1))
    keys = objective("sapo", tau_positive=1.0, tau_negative=2.0, **UNBOUND)
    values, slopes = evaluated(keys, [-1 + LN2, -0.5], [-1.0, -0.5], [3.0, -2.0], [1, 1])
    assert values == pytest.approx([12 * s, -2.0], rel=1e-14)
    assert slopes == pytest.approx([4 * s * (1 - s) * 2 * 3, -2.0], rel=1e-13)  # at rho = 1 the slope is A


def test_gmpo_clips_each_token_in_the_exponent_on_one_side() -> None:
    # A = 2, d = ln 2, -ln 3: 0.4 and -ln 3, as A > 0 is not clipped below. A = -1, d = -ln 2, 1: -0.4 and 1.
    keys = objective("gmpo", clip_low=0.4, clip_high=0.4)
    policy, old = [-1 + LN2, -1 - LN3, -2 - LN2, -1.0], [-1.0, -1.0, -2.0, -2.0]
    advantages, lengths = [2.0, 2.0, -1.0, -1.0], [2, 2]
    values, slopes = evaluated(keys, policy, old, advantages, lengths)
    first, second = 2 * math.exp((0.4 - LN3) / 2), -math.exp((-0.4 + 1) / 2)
    assert values == pytest.approx([first, second], rel=1e-14)
    assert slopes == pytest.approx([0.0, first / 2, 0.0, second / 2], rel=1e-13)
    assert sides(keys, policy, old, advantages, lengths) == (
        [False, False, True, False],
        [True, False, False, False],
    )


@pytest.mark.parametrize(
    ("surrogate", "low", "high", "expected"),
    [
        # p - q = 0.3, 0.3, -0.3, -0.3, 0.1: past 0.2 upwards with A > 0, downwards with A < 0.
        ("dppo_tv", 0.2, 0.2, [0, 2, 2, 0, 1]),
        ("dppo_tv", None, None, [2, 2, 2, 2, 1]),
        ("dppo_tv", 0.31, 0.05, [0, 2, 2, 2, 0]),
        # KL from 0.5 to 0.8 and to 0.2: 0.5 ln(1 / 0.64) = 0.2231; to 0.6: 0.5 ln(1 / 0.96) = 0.0204.
        ("dppo_kl", 0.22, 0.22, [0, 2, 2, 0, 1]),
        ("dppo_kl", 0.224, 0.224, [2, 2, 2, 2, 1]),
        ("dppo_kl", 0.224, 0.02, [0, 2, 2, 2, 0]),
    ],
)
def test_dppo_masks_what_already_went_too_far(
    surrogate: str, low: float | None, high: float | None, expected: list[int]
) -> None:
    policy, old = [math.log(p) for p in (0.8, 0.8, 0.2, 0.2, 0.6)], [math.log(0.5)] * 5
    advantages, ratios = [1.0, -1.0, 1.0, -1.0, 1.0], [1.6, 1.6, 0.4, 0.4, 1.2]
    keys = objective(surrogate, clip_low=low, clip_high=high, ratio_cap=1.5)
    values, slopes = evaluated(keys, policy, old, advantages, [1] * 5)
    weights = [min(rho, 1.5) * bool(kept) for rho, kept in zip(ratios, expected, strict=True)]
    assert slopes == pytest.approx([w * a for w, a in zip(weights, advantages, strict=True)], rel=1e-13)
    assert values == pytest.approx(
        [w * a * p for w, a, p in zip(weights, advantages, policy, strict=True)], rel=1e-13
    )
    below, above = sides(keys, policy, old, advantages, [1] * 5)
    assert [b or a for b, a in zip(below, above, strict=True)] == [not kept for kept in expected]
    assert not any(below[i] for i in (0, 1, 2, 4))
    assert not any(above[i] for i in (1, 2, 3))


def test_vespo_weighs_every_token_by_the_ratio_of_its_rollout() -> None:
    # d = ln 2, ln 3: w = 6, A > 0: phi = e^3 6^2 e^-18. d = -ln 2: w = 1/2, A < 0: e^2 / 8 e^-1.
    # w = 1: phi = 1.
    keys = objective("vespo", **UNBOUND)
    policy, old = [-1 + LN2, -2 + LN3, -0.5 - LN2, -0.7], [-1.0, -2.0, -0.5, -0.7]
    values, slopes = evaluated(keys, policy, old, [2.0, 2.0, -1.0, 0.5], [2, 1, 1])
    phi = [36 * math.exp(-15), 36 * math.exp(-15), math.e / 8, 1.0]
    weights = [f * a for f, a in zip(phi, [2.0, 2.0, -1.0, 0.5], strict=True)]
    assert slopes == pytest.approx(weights, rel=1e-12)
    assert values == pytest.approx([w * p for w, p in zip(weights, policy, strict=True)], rel=1e-12)


# ---- gradients ----

# Rollouts of 3, 1 and 2 tokens, near and far from pi_old on both sides.
POLICY, OLD = [-0.9, -1.7, -0.4, -2.0, -1.2, -0.3], [-1.0, -1.2, -1.1, -1.6, -1.5, -0.6]
ADVANTAGES, LENGTHS = [1.3, 1.3, 1.3, -0.7, -1.1, -1.1], [3, 1, 2]
DETACHED = ("cispo", "dppo_tv", "dppo_kl", "vespo")


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("bound", [0.05, 0.2, 0.6])
def test_the_gradient_is_that_of_finite_differences(surrogate: str, bound: float) -> None:
    clips = {"clip_low": bound, "clip_high": bound} if surrogate in CLIPPED else UNBOUND
    keys = objective(surrogate, **clips)
    _, slopes = evaluated(keys, POLICY, OLD, ADVANTAGES, LENGTHS)
    for t in range(len(POLICY)):
        ends = []
        for h in (1e-6, -1e-6):
            policy = [*POLICY[:t], POLICY[t] + h, *POLICY[t + 1 :]]
            # A weight that is held constant: pi_old moves along, so that no ratio does.
            old = [*OLD[:t], OLD[t] + h, *OLD[t + 1 :]] if surrogate in DETACHED else OLD
            ends.append(sum(evaluated(keys, policy, old, ADVANTAGES, LENGTHS)[0]))
        assert slopes[t] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_policy_the_gradient_is_that_of_reinforce(surrogate: str) -> None:
    clips = {"clip_low": 0.2, "clip_high": 0.2} if surrogate in CLIPPED else UNBOUND
    _, slopes = evaluated(objective(surrogate, **clips), OLD, OLD, ADVANTAGES, LENGTHS)
    lengths = [3, 3, 3, 1, 2, 2]  # one value per rollout is the mean of its tokens
    shares = [1 / n if surrogate == "gmpo" else 1.0 for n in lengths]
    assert slopes == pytest.approx([a * s for a, s in zip(ADVANTAGES, shares, strict=True)], rel=1e-13)


# ---- guards ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("aggregate", ["sequence_mean", "prompt_mean"])
def test_extreme_log_probs_give_a_finite_loss_and_gradient(
    dtype: torch.dtype, surrogate: str, aggregate: str
) -> None:
    # Certain tokens (log-prob 0), impossible ones, and moves from one to the other, with either advantage.
    pairs = [(0.0, -1000.0), (-1000.0, 0.0), (0.0, 0.0), (-1000.0, -1000.0), (-1e-9, 0.0), (0.0, -1e-9)]
    policy, old = (torch.tensor([*side, *side], dtype=dtype) for side in zip(*pairs, strict=True))
    policy.requires_grad_()
    lengths_B = torch.tensor([1, 2, 3, 1, 2, 3])
    advantages_N = torch.tensor([1.0, -1.0], dtype=dtype).repeat_interleave(6)
    clips = {"clip_low": 0.2, "clip_high": 0.2} if surrogate in CLIPPED else UNBOUND
    keys = objective(surrogate, aggregate=aggregate, off_policy_mask=0.1, **clips)
    given = Given(lengths_B, advantages_N, old, group_tokens_B=lengths_B, sampled_logprobs_N=old)
    loss, ratio_R = policy_loss(policy, given, keys, Step(6, 12, 8, 6))
    [slopes_N] = torch.autograd.grad(loss, policy)
    assert math.isfinite(loss.item())
    assert bool(slopes_N.isfinite().all())
    assert ratio_R.max().item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-6)


def test_a_weight_of_vespo_is_bounded_however_steep_it_is() -> None:
    keys = objective("vespo", k_positive=50.0, lambda_positive=0.0, **UNBOUND)
    _, slopes = evaluated(keys, [-1.0], [-11.0], [1.0], [1])  # e^500 without the bound
    assert slopes == pytest.approx([math.exp(MAX_LOG_RATIO)], rel=1e-12)


# ---- masks ----


def slopes_of(keys: Objective, **more: Tensor) -> list[float]:
    """Gradient of the loss by each log-prob on-policy, where it is minus the weight of the advantage."""
    logprobs_N = doubles(*OLD).requires_grad_()
    given = Given(torch.tensor(LENGTHS), doubles(*ADVANTAGES), doubles(*OLD), **more)
    loss, _ = policy_loss(logprobs_N, given, keys, Step(3, 6, 8))
    found: list[float] = torch.autograd.grad(loss, logprobs_N)[0].tolist()
    return found


@pytest.mark.parametrize("weights", [None, [2.0] * 6])
def test_a_masked_token_has_no_gradient_and_changes_no_denominator(weights: list[float] | None) -> None:
    keys = Objective(aggregate="token_mean")
    more = {} if weights is None else {"weights_V": doubles(*weights)}
    whole = slopes_of(keys, **more)
    low_N = torch.tensor([True, False, False, True, False, True])
    expected = [0.0 if low else slope for low, slope in zip(low_N.tolist(), whole, strict=True)]
    assert slopes_of(keys, low_entropy_N=low_N, **more) == expected


@pytest.mark.parametrize(
    ("gaps", "kept"),
    [
        # Mean gap of each rollout to the sampler: A = 1.3 | -0.7 | -1.1, the mask at 0.1.
        ([9.0, 9.0, 9.0, 0.05, 0.3, -0.2], [1, 1, 1]),  # A > 0 is never masked; means 0.05 and 0.05
        ([0.0, 0.0, 0.0, 0.15, 0.3, -0.2], [1, 0, 1]),
        ([0.0, 0.0, 0.0, -9.0, 0.3, 0.0], [1, 1, 0]),  # likelier than when sampled is no reason
    ],
)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_rollout_left_behind_gives_no_gradient_where_its_advantage_is_negative(
    gaps: list[float], kept: list[int], surrogate: str
) -> None:
    clips = {"clip_low": 0.2, "clip_high": 0.2} if surrogate in CLIPPED else UNBOUND
    sampled_N = doubles(*OLD) + doubles(*gaps)
    whole = slopes_of(objective(surrogate, **clips))
    found = slopes_of(objective(surrogate, off_policy_mask=0.1, **clips), sampled_logprobs_N=sampled_N)
    kept_N = [kept[i] for i, n in enumerate(LENGTHS) for _ in range(n)]
    assert found == [slope if keep else 0.0 for slope, keep in zip(whole, kept_N, strict=True)]
