"""Advantages of tokens, where a teacher has a say: the numbers, and a gradient that is the reverse KL's."""

from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from grpo import tables
from grpo.config import UpdateConfig
from grpo.errors import CorruptError
from grpo.update import loss
from grpo.update.batch import kept_rollouts
from grpo.update.given import Given, Objective, Step
from grpo.update.objective import needed

MASKS = [[True, True], [True, False, True], [True]]
OLD = [[-1.0, -2.0], [-0.5, -9.0, -0.25], [-3.0]]
TEACHERS = {"a": [[-0.5, -2.5], [-0.5, 0.0, -0.75], [-1.0]], "b": [[-2.0, -1.0], [-0.5, 0.0, -0.25], [-3.0]]}


def key(n: int) -> dict[str, int]:
    return {"iteration": 0, "group_id": 0, "sample_id": n}


def inputs() -> tuple[pa.Table, pa.Table, pa.Table]:
    rollouts = [
        {
            **key(n),
            "prompt_token_ids": [1],
            "response_token_ids": [2] * len(mask),
            "response_mask": mask,
            "old_logprobs": old,
            "temperature": 1.0,
        }
        for n, (mask, old) in enumerate(zip(MASKS, OLD, strict=True))
    ]
    advantages = [{**key(n), "advantage": a, "keep": a is not None} for n, a in enumerate((1.0, -2.0, None))]
    said = [
        {**key(n), "name": name, "logprobs": values, "gap": 0.0}
        for name, rows in TEACHERS.items()
        for n, values in enumerate(rows)
    ]
    made = [
        pa.Table.from_pylist(rows, schema=tables.schema(name))
        for name, rows in (("rollouts", rollouts), ("advantages", advantages), ("teacher_logprobs", said))
    ]
    return made[0], made[1], made[2]


def test_by_hand() -> None:
    found = kept_rollouts(*inputs(), {"a": 2.0, "b": 0.5})
    assert found.token_advantages is not None
    # 1 + 2 (-0.5 + 1) + 0.5 (-2 + 1), 1 + 2 (-2.5 + 2) + 0.5 (-1 + 2); -2, and -2 + 2 (-0.75 + 0.25)
    assert [each.tolist() for each in found.token_advantages] == [[1.5, 0.5], [-2.0, -3.0]]
    assert found.advantages.tolist() == [1.0, -2.0]


def test_rows_of_other_rollouts_are_corrupt() -> None:
    rollouts, advantages, said = inputs()
    with pytest.raises(CorruptError, match="teacher_logprobs of b are not of these rollouts"):
        kept_rollouts(rollouts, advantages, said.slice(0, 5), {"a": 1.0, "b": 1.0})


def test_a_rollout_without_a_gap_needs_no_forward_pass() -> None:
    rollouts, advantages, said = inputs()
    zero = pa.array([0.0, 0.0, None])
    advantages = advantages.set_column(advantages.schema.get_field_index("advantage"), "advantage", zero)
    config = UpdateConfig(kl_coefficient=0.0)
    assert needed(config, kept_rollouts(rollouts, advantages, said, {"a": 1.0})).tolist() == [True, True]
    assert needed(config, kept_rollouts(rollouts, advantages, said, {"b": 1.0})).tolist() == [True, False]
    assert needed(config, kept_rollouts(rollouts, advantages)).tolist() == [False, False]


@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_expected_gradient_is_that_of_the_reverse_kl(surrogate: str, weight: float) -> None:
    """Every response of two tokens over a vocabulary of four, each with its probability; float64."""
    torch.manual_seed(0)
    size = 4
    first_V = torch.randn(size, dtype=torch.float64, requires_grad=True)
    second_VV = torch.randn(size, size, dtype=torch.float64, requires_grad=True)
    teacher = [torch.randn(size, dtype=torch.float64), torch.randn(size, size, dtype=torch.float64)]
    policy = [logits.log_softmax(-1) for logits in (first_V, second_VV)]
    teacher = [logits.log_softmax(-1) for logits in teacher]

    def of(logprobs: list[torch.Tensor], x: int, y: int) -> torch.Tensor:
        return torch.stack([logprobs[0][x], logprobs[1][x, y]])

    pairs = list(product(range(size), repeat=2))
    objective: dict[str, Any] = {"surrogate": surrogate, "aggregate": "sequence_sum"}
    total = torch.zeros((), dtype=torch.float64)
    for x, y in pairs:
        own_N = of(policy, x, y)
        old_N = own_N.detach()
        advantages_N = weight * (of(teacher, x, y) - old_N)
        given = Given(torch.tensor([2]), advantages_N, old_N, group_tokens_B=torch.tensor([2]))
        value, _ = loss.policy_loss(own_N, given, Objective(**objective), Step(1, 2, 2, 1))
        total = total + old_N.sum().exp() * value
    found = torch.autograd.grad(total, [first_V, second_VV], retain_graph=True)

    kl_first = (policy[0].exp() * (policy[0] - teacher[0])).sum()
    kl_second_V = (policy[1].exp() * (policy[1] - teacher[1])).sum(-1)  # given the first token
    expected = torch.autograd.grad(
        weight * (kl_first + (policy[0].detach().exp() * kl_second_V).sum()), [first_V, second_VV]
    )
    for ours, right in zip(found, expected, strict=True):
        assert (ours - right).norm() <= 1e-10 * right.norm()


def test_as_a_plain_loop_has_it() -> None:
    """Loss and gradient of token advantages on random rollouts against sums written out; float64."""
    draw = np.random.default_rng(0)
    lengths = [3, 1, 5]
    rows = [draw.normal(-1, 0.3, (3, n)) for n in lengths]  # policy, old, advantage
    value, gradient = 0.0, []
    for policy, old, advantage in rows:
        slopes = []
        for d, a in zip(policy - old, advantage, strict=True):
            rho = np.exp(d)
            clipped = min(max(rho, 0.8), 1.2)
            value += min(rho * a, clipped * a) / len(policy) / 3
            slopes.append(-rho * a / len(policy) / 3 if rho * a <= clipped * a else 0.0)
        gradient += slopes
    policy_N, old_N, advantages_N = (torch.tensor(np.concatenate([row[k] for row in rows])) for k in range(3))
    policy_N.requires_grad_()
    given = Given(torch.tensor(lengths), advantages_N, old_N, group_tokens_B=torch.tensor(lengths))
    found, _ = loss.policy_loss(policy_N, given, Objective(), Step(3, 9, 8, 1))
    [slope_N] = torch.autograd.grad(found, [policy_N])
    assert found.item() == pytest.approx(-value, rel=1e-12)
    np.testing.assert_allclose(slope_N.numpy(), gradient, rtol=1e-10, atol=1e-14)
