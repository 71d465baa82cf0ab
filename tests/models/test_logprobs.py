import math

import pytest
import torch

from grpo.models.logprobs import entropy, log_probabilities, token_logprobs

# Softmax of these logits is 1/2, 1/4, 1/4.
LOGITS = [math.log(2), 0.0, 0.0]


def test_logprobs_and_entropy_by_hand() -> None:
    logits_NV = torch.tensor([LOGITS, LOGITS])
    logprobs_N, entropy_N = token_logprobs(
        logits_NV, torch.tensor([0, 2]), torch.tensor([1.0, 1.0]), with_entropy=True
    )
    assert logprobs_N.tolist() == pytest.approx([math.log(0.5), math.log(0.25)])
    # 1/2 log 2 + 2 * 1/4 log 4 = 1.5 log 2
    assert entropy_N is not None
    assert entropy_N.tolist() == pytest.approx([1.5 * math.log(2)] * 2)


def test_each_position_has_its_own_temperature() -> None:
    # At temperature 0.5 the weights 2, 1, 1 become 4, 1, 1: the first has 4/6.
    logprobs_N, none = token_logprobs(
        torch.tensor([LOGITS, LOGITS]), torch.tensor([0, 0]), torch.tensor([0.5, 1.0], dtype=torch.float64)
    )
    assert logprobs_N.tolist() == pytest.approx([math.log(4 / 6), math.log(1 / 2)])
    assert none is None


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_float32_or_better(given: torch.dtype, computed: torch.dtype) -> None:
    logprobs_N, _ = token_logprobs(torch.zeros(1, 4, dtype=given), torch.tensor([1]), torch.tensor([1.0]))
    assert logprobs_N.dtype == computed
    assert logprobs_N.tolist() == pytest.approx([math.log(0.25)])


def test_huge_logits_stay_finite_and_never_above_zero() -> None:
    logits_NV = torch.tensor([[3e38, 0.0], [1000.0, 1000.0], [-3e38, -3e38]])
    logprobs_N, entropy_N = token_logprobs(
        logits_NV, torch.tensor([0, 1, 1]), torch.ones(3), with_entropy=True
    )
    assert logprobs_N.tolist() == pytest.approx([0.0, math.log(0.5), math.log(0.5)])
    assert bool((logprobs_N <= 0).all())
    assert entropy_N is not None
    assert entropy_N.tolist() == pytest.approx([0.0, math.log(2), math.log(2)])


def test_a_token_that_cannot_occur_adds_nothing_to_the_entropy_or_its_gradient() -> None:
    logits_NV = torch.tensor([[math.log(3), 0.0, -torch.inf]], requires_grad=True)
    entropy_N = entropy(log_probabilities(logits_NV, torch.ones(1)))
    entropy_N.sum().backward()  # type: ignore[no-untyped-call]
    # p = 3/4, 1/4; dH/dlogit_i = -p_i (log p_i + H)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy_N.item() == pytest.approx(expected)
    assert logits_NV.grad is not None
    gradient = [-p * (math.log(p) + expected) for p in (0.75, 0.25)]
    assert logits_NV.grad[0].tolist() == pytest.approx([*gradient, 0.0])


def test_the_gradient_is_that_of_log_softmax() -> None:
    logits_NV = torch.tensor([LOGITS], requires_grad=True)
    logprobs_N, _ = token_logprobs(logits_NV, torch.tensor([0]), torch.tensor([0.5]))
    logprobs_N.sum().backward()  # type: ignore[no-untyped-call]
    # (one_hot - softmax) / temperature with softmax 4/6, 1/6, 1/6
    assert logits_NV.grad is not None
    assert logits_NV.grad[0].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
