import math

import numpy as np
import pytest
import torch

from grpo.errors import DataError
from grpo.generate.engines.draw import draw, pick, uniforms


def test_pick_at_the_edges_of_the_distribution() -> None:
    probabilities_NV = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).repeat(6, 1)
    largest = 1 - 2**-53  # of the numbers `uniforms` gives
    uniforms_N = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, largest], dtype=torch.float64)
    # Cumulative: 0, .25, .25, .75, 1, 1. A number equal to a bound belongs to the next positive token.
    assert pick(probabilities_NV, uniforms_N).tolist() == [1, 1, 3, 3, 4, 4]


def test_pick_never_runs_past_probabilities_that_do_not_add_up_to_one() -> None:
    probabilities_NV = torch.rand(5000, 4, generator=torch.Generator().manual_seed(0))
    probabilities_NV[:, 3] = 0.0
    uniforms_N = torch.full((5000,), 1 - 2**-53, dtype=torch.float64)
    assert pick(probabilities_NV, uniforms_N).tolist() == [2] * 5000


def test_draw_by_hand() -> None:
    # Softmax of log 1, 2, 1 is 1/4, 1/2, 1/4; at temperature 0.5 it is 1/6, 4/6, 1/6.
    logits_NV = torch.tensor([[0.0, math.log(2), 0.0]]).repeat(2, 1)
    uniforms_N = torch.tensor([0.2, 0.8], dtype=torch.float64)
    tokens_N, logprobs_N = draw(logits_NV, uniforms_N, 1.0)
    assert tokens_N.tolist() == [0, 2]
    assert logprobs_N.tolist() == pytest.approx([math.log(1 / 4)] * 2)
    tokens_N, logprobs_N = draw(logits_NV, uniforms_N, 0.5)
    assert tokens_N.tolist() == [1, 1]
    assert logprobs_N.tolist() == pytest.approx([math.log(4 / 6)] * 2)
    assert logprobs_N.dtype == torch.float32


def test_draw_never_takes_a_token_of_logit_minus_infinity() -> None:
    logits_NV = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    tokens_N, _ = draw(logits_NV, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert tokens_N.tolist() == [1, 3, 3]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draw_refuses_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    logits_NV = torch.tensor([[0.0, 1.0], [bad, 0.0]])
    with pytest.raises(
        DataError, match="the policy's logits hold NaN or infinity: its weights have diverged"
    ):
        draw(logits_NV, torch.zeros(2, dtype=torch.float64), temperature)


def test_uniforms_are_those_of_a_philox_of_each_seed() -> None:
    seeds = [0, 7, 2**63 - 1, 7]
    by_hand = [np.random.Generator(np.random.Philox(key=seed)).random(5) for seed in seeds]
    assert uniforms(seeds, 5).tolist() == [row.tolist() for row in by_hand]
    assert uniforms(seeds, 3).tolist() == [row[:3].tolist() for row in by_hand]  # a longer row begins alike
    assert uniforms([], 5).shape == (0, 5)
