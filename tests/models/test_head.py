import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from grpo.models.head import Head, head_logits, head_logprobs
from grpo.models.logprobs import token_logprobs

N, D, V = 37, 16, 258
NARROWEST = 1  # chunk_bytes: chunks of D columns then, the last one of 2
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.0625},
    "softcap": {"softcap": 5.0},
    "bias": {"bias": True},
    "impossible tokens": {"bias": True, "impossible": slice(0, 50)},
    "all": {"scale": 3.0, "softcap": 5.0, "bias": True},
}


def inputs(
    dtype: torch.dtype, *, scale: float = 1.0, softcap: float | None = None, bias: bool = False, **more: Any
) -> tuple[Tensor, Head, Tensor, Tensor]:
    """Hidden states, a head, targets and temperatures between 0.5 and 1.5, from one seed."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = None
    if bias:
        bias_V = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype)
        bias_V[more.get("impossible", slice(0, 0))] = -torch.inf
        bias_V.requires_grad_()
    targets_N = torch.randint(50, V, (N,), generator=generator)
    return (
        hidden_ND,
        Head(weight_VD, bias_V, scale, softcap),
        targets_N,
        torch.rand(N, generator=generator) + 0.5,
    )


def gradients(logprobs_N: Tensor, entropy_N: Tensor | None, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a sum with another weight for every log-prob, and for every entropy that is given."""
    weights_N = torch.linspace(-1, 2, len(logprobs_N), dtype=logprobs_N.dtype)
    loss = (weights_N * logprobs_N).sum()
    if entropy_N is not None:
        loss = loss + (weights_N.flip(0) * entropy_N).sum()
    return list(torch.autograd.grad(loss, leaves))


def leaves_of(hidden_ND: Tensor, head: Head) -> list[Tensor]:
    return [leaf for leaf in (hidden_ND, head.weight_VD, head.bias_V) if leaf is not None]


def assert_near(found: Tensor, right: Tensor, tolerance: float) -> None:
    """The largest difference, relative to the largest value."""
    assert found.dtype == right.dtype
    assert bool(right.isfinite().all())
    assert (found - right).abs().max().item() <= tolerance * right.abs().max().item()


def test_logprobs_and_entropy_by_hand() -> None:
    # Logits log 2 * (1, 0, 0): softmax 1/2, 1/4, 1/4, and at temperature 0.5 the weights 4, 1, 1.
    hidden_ND = torch.full((2, 1), math.log(2))
    head = Head(torch.tensor([[1.0], [0.0], [0.0]]))
    logprobs_N, entropy_N = head_logprobs(
        hidden_ND,
        head,
        torch.tensor([0, 2]),
        torch.tensor([1.0, 0.5]),
        with_entropy=True,
        chunk_bytes=NARROWEST,
    )
    assert logprobs_N.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 6)])
    assert entropy_N is not None
    # 1/2 log 2 + 2 * 1/4 log 4 = 1.5 log 2; 2/3 log 3/2 + 2 * 1/6 log 6
    expected = [1.5 * math.log(2), 2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(6)]
    assert entropy_N.tolist() == pytest.approx(expected)


def test_the_gradients_by_hand() -> None:
    # One token, one-wide hidden state h = log 2, W = (1, 0, 0): p = 1/2, 1/4, 1/4, H = 1.5 log 2.
    hidden_ND = torch.full((1, 1), math.log(2), requires_grad=True)
    weight_VD = torch.tensor([[1.0], [0.0], [0.0]], requires_grad=True)
    logprobs_N, entropy_N = head_logprobs(
        hidden_ND,
        Head(weight_VD),
        torch.tensor([0]),
        torch.ones(1),
        with_entropy=True,
        chunk_bytes=NARROWEST,
    )
    assert entropy_N is not None
    of_hidden, of_weight = torch.autograd.grad(logprobs_N.sum(), [hidden_ND, weight_VD], retain_graph=True)
    # d logprob / d logits = one_hot - p = 1/2, -1/4, -1/4; times W, times h
    assert of_hidden.item() == pytest.approx(1 / 2)
    assert of_weight[:, 0].tolist() == pytest.approx([x * math.log(2) for x in (1 / 2, -1 / 4, -1 / 4)])
    of_hidden, of_weight = torch.autograd.grad(entropy_N.sum(), [hidden_ND, weight_VD])
    # dH / d logits = -p (log p + H) = log 2 * (-1/4, 1/8, 1/8)
    assert of_hidden.item() == pytest.approx(-math.log(2) / 4)
    assert of_weight[:, 0].tolist() == pytest.approx([x * math.log(2) ** 2 for x in (-1 / 4, 1 / 8, 1 / 8)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk_bytes", [NARROWEST, 4 * N * 100, 2**30])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_equal_to_full_logits_at_any_chunk_size(
    name: str, with_entropy: bool, chunk_bytes: int, dtype: torch.dtype, tolerance: float
) -> None:
    hidden_ND, head, targets_N, temperature_N = inputs(dtype, **HEADS[name])
    leaves = leaves_of(hidden_ND, head)
    logits_NV = head_logits(hidden_ND, head)
    right = token_logprobs(logits_NV, targets_N, temperature_N, with_entropy=with_entropy)
    found = head_logprobs(
        hidden_ND, head, targets_N, temperature_N, with_entropy=with_entropy, chunk_bytes=chunk_bytes
    )
    assert (found[1] is None) == (not with_entropy)
    for one, other in zip(found, right, strict=True):
        if one is not None and other is not None:
            assert_near(one, other, tolerance)
            assert bool(((one <= 0) if one is found[0] else (one >= 0)).all())
    for one, other in zip(gradients(*found, leaves), gradients(*right, leaves), strict=True):
        assert_near(one, other, tolerance)


def test_an_entropy_that_no_loss_uses_changes_no_gradient() -> None:
    hidden_ND, head, targets_N, temperature_N = inputs(torch.float32)
    found = [
        gradients(
            head_logprobs(
                hidden_ND,
                head,
                targets_N,
                temperature_N,
                with_entropy=with_entropy,
                chunk_bytes=NARROWEST,
            )[0],
            None,
            leaves_of(hidden_ND, head),
        )
        for with_entropy in (False, True)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_nothing_is_kept_where_no_gradient_is_needed() -> None:
    hidden_ND, head, targets_N, temperature_N = inputs(torch.float32)
    right_N, _ = token_logprobs(head_logits(hidden_ND, head), targets_N, temperature_N)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found_N, _ = head_logprobs(
                hidden_ND, head, targets_N, temperature_N, with_entropy=False, chunk_bytes=NARROWEST
            )
        assert found_N.grad_fn is None
        assert_near(found_N, right_N.detach(), 1e-5)


def test_a_frozen_head_passes_its_gradient_on() -> None:
    hidden_ND, head, targets_N, temperature_N = inputs(torch.float32)
    [right, _] = gradients(
        *token_logprobs(head_logits(hidden_ND, head), targets_N, temperature_N), leaves_of(hidden_ND, head)
    )
    head.weight_VD.requires_grad_(False)
    logprobs_N, _ = head_logprobs(
        hidden_ND, head, targets_N, temperature_N, with_entropy=False, chunk_bytes=NARROWEST
    )
    [found] = gradients(logprobs_N, None, [hidden_ND])
    assert_near(found, right, 1e-5)
    assert head.weight_VD.grad is None


def test_no_tokens_give_no_logprobs() -> None:
    hidden_ND, head, targets_N, temperature_N = inputs(torch.float32)
    logprobs_N, entropy_N = head_logprobs(
        hidden_ND[:0], head, targets_N[:0], temperature_N[:0], with_entropy=True, chunk_bytes=NARROWEST
    )
    assert entropy_N is not None
    assert logprobs_N.shape == entropy_N.shape == (0,)


def test_huge_logits_stay_finite() -> None:
    # One logit per chunk: the largest so far rises by 6e38, which float32 does not hold.
    head = Head(torch.zeros(3, 1), torch.tensor([-3e38, 3e38, 0.0]))
    logprobs_N, entropy_N = head_logprobs(
        torch.zeros(1, 1), head, torch.tensor([1]), torch.ones(1), with_entropy=True, chunk_bytes=NARROWEST
    )
    assert entropy_N is not None
    assert (logprobs_N.tolist(), entropy_N.tolist()) == ([0.0], [0.0])


def test_a_logit_that_is_not_a_number_is_not_hidden() -> None:
    hidden_ND, head, targets_N, temperature_N = inputs(torch.float32)
    with torch.no_grad():
        hidden_ND[3, 0] = math.nan
    logprobs_N, entropy_N = head_logprobs(
        hidden_ND, head, targets_N, temperature_N, with_entropy=True, chunk_bytes=NARROWEST
    )
    assert entropy_N is not None
    assert logprobs_N.isnan().nonzero().tolist() == entropy_N.isnan().nonzero().tolist() == [[3]]


def test_autocast_keeps_float32_outside_of_the_products() -> None:
    hidden_ND, head, targets_N, temperature_N = inputs(torch.float32, bias=True)
    leaves = leaves_of(hidden_ND, head)
    right_N, right_entropy_N = token_logprobs(
        head_logits(hidden_ND, head), targets_N, temperature_N, with_entropy=True
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_N, entropy_N = head_logprobs(
            hidden_ND, head, targets_N, temperature_N, with_entropy=True, chunk_bytes=NARROWEST
        )
        inside = gradients(found_N, entropy_N, leaves)
        found_N, entropy_N = head_logprobs(
            hidden_ND, head, targets_N, temperature_N, with_entropy=True, chunk_bytes=NARROWEST
        )
    outside = gradients(found_N, entropy_N, leaves)
    # A bfloat16 has 8 bits: 2^-9 per rounding, of the hidden states and the weight.
    assert_near(found_N, right_N, 2 * 2**-8)
    # A gradient is of the type of its leaf, and the same whether the backward is within autocast or not.
    for one, other, right in zip(inside, outside, gradients(right_N, right_entropy_N, leaves), strict=True):
        assert torch.equal(one, other)
        assert_near(one, right, 3 * 2**-8)


def test_under_autocast_products_are_added_up_in_float32() -> None:
    hidden_ND, head, targets_N, temperature_N = inputs(torch.float32, scale=3.0, softcap=5.0, bias=True)
    assert head.bias_V is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found_N, _ = head_logprobs(hidden_ND, head, targets_N, temperature_N, with_entropy=False)
    product_NV = (hidden_ND.bfloat16().float() @ head.weight_VD.bfloat16().float().t()).detach()
    logits_NV = 5 * torch.tanh(3 * (product_NV + head.bias_V.detach()) / 5)
    right_N, _ = token_logprobs(logits_NV, targets_N, temperature_N)
    assert_near(found_N, right_N, 1e-6)


def test_large_logits_of_bfloat16_values_lose_nothing() -> None:
    """Rounded to bfloat16, logits of up to 26 would be 1.9e-2 off in the mean."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(64, 128, generator=generator).bfloat16().float()
    weight_VD = (torch.randn(4096, 128, generator=generator) * 0.5).bfloat16().float()
    targets_N, temperature_N = torch.randint(4096, (64,), generator=generator), torch.full((64,), 0.7)
    logits_NV = hidden_ND.double() @ weight_VD.double().t()
    assert logits_NV.max() > 20
    right_N, right_entropy_N = token_logprobs(logits_NV, targets_N, temperature_N, with_entropy=True)
    assert right_entropy_N is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for chunk_bytes in (NARROWEST, 2**30):
            found_N, entropy_N = head_logprobs(
                hidden_ND,
                Head(weight_VD),
                targets_N,
                temperature_N,
                with_entropy=True,
                chunk_bytes=chunk_bytes,
            )
            assert entropy_N is not None
            assert (found_N - right_N).abs().max() <= 3e-5
            assert (entropy_N - right_entropy_N).abs().max() <= 3e-5


def test_a_gpu_has_larger_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, int] = {}

    def apply(logits_of: Any, *others: object) -> tuple[None, None]:
        taken[others[1].device.type] = logits_of.args[3]  # type: ignore[attr-defined]
        return None, None

    monkeypatch.setattr("grpo.models.head._ChunkedLogprobs.apply", apply)
    num_tokens, width, vocabulary = 8192, 16, 151_936
    for device in ("cpu", "cuda"):
        with FakeTensorMode():  # shapes alone: no GPU, no memory
            hidden_ND = torch.empty(num_tokens, width, device=device)
            weight_VD = torch.empty(vocabulary, width, device=device)
            targets_N = torch.empty(num_tokens, dtype=torch.int64, device=device)
            temperature_N = torch.empty(num_tokens, device=device)
            head_logprobs(hidden_ND, Head(weight_VD), targets_N, temperature_N, with_entropy=True)
    # 2 ** 26 and 2 ** 29 bytes over 8,192 rows of 4: 75 rounds, and 10.
    assert taken == {"cpu": 2048, "cuda": 16_384}
