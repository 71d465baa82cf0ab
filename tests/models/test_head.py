import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.tiny import BYTES, WIDTHS, qwen2
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from grpo.models.head import Head, head_logits, head_logprobs, split_head
from grpo.models.logprobs import token_logprobs

N, D, V = 37, 16, 258
NARROWEST = 1  # chunk_bytes: chunks of D columns then, the last one of 2
TINY: dict[str, Any] = {
    "vocab_size": BYTES,
    **WIDTHS,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
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
    # A bfloat16 has 8 bits: 2^-9 per rounding, of the hidden states, the weight, and the product.
    assert_near(found_N, right_N, 3 * 2**-8)
    # A gradient is of the type of its leaf, and the same whether the backward is within autocast or not.
    for one, other, right in zip(inside, outside, gradients(right_N, right_entropy_N, leaves), strict=True):
        assert torch.equal(one, other)
        assert_near(one, right, 3 * 2**-8)


def test_under_autocast_one_chunk_has_float32_outside_of_the_product_too() -> None:
    hidden_ND, head, targets_N, temperature_N = inputs(torch.float32, scale=3.0, softcap=5.0, bias=True)
    assert head.bias_V is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found_N, _ = head_logprobs(hidden_ND, head, targets_N, temperature_N, with_entropy=False)
    product_NV = (hidden_ND.bfloat16() @ head.weight_VD.bfloat16().t()).detach().float()
    logits_NV = 5 * torch.tanh(3 * (product_NV + head.bias_V.detach()) / 5)
    right_N, _ = token_logprobs(logits_NV, targets_N, temperature_N)
    assert_near(found_N, right_N, 1e-6)


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    # eager: the only attention that every supported release has for every one of these.
    model: PreTrainedModel = auto.from_config(config, attn_implementation="eager").eval()
    return model


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (qwen2(), 1.0, None),
        (qwen2(tie_word_embeddings=True), 1.0, None),
        (LlamaConfig(**TINY), 1.0, None),
        (Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=30.0), 1.0, 30.0),
        (Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=None), 1.0, None),
        (GraniteConfig(**TINY, logits_scaling=8.0), 1 / 8, None),
        (CohereConfig(**TINY, logit_scale=0.0625), 0.0625, None),
        (GPT2Config(vocab_size=BYTES, n_embd=32, n_layer=2, n_head=4, n_positions=64), 1.0, None),
        (PhiConfig(**TINY), 1.0, None),
        (OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=16), 1.0, None),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else str(value),
)
def test_split_head_gives_the_models_own_logprobs_and_gradients(
    config: PreTrainedConfig, scale: float, softcap: float | None
) -> None:
    model = build(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero in a new model
            torch.nn.init.normal_(parameter)
    split = split_head(model)
    assert split is not None
    trunk, head = split
    assert (head.scale, head.softcap) == (scale, softcap)
    assert (head.bias_V is not None) == (config.model_type == "phi")
    input_ids_BL = torch.arange(0, 60, 3).view(2, 10)
    targets_N, temperature_N = input_ids_BL.flatten() + 1, torch.linspace(0.5, 1.5, 20)
    logits_NV = model(input_ids=input_ids_BL, use_cache=False).logits.flatten(0, 1)
    right = token_logprobs(logits_NV, targets_N, temperature_N, with_entropy=True)
    hidden_ND = trunk(input_ids=input_ids_BL, use_cache=False).last_hidden_state.flatten(0, 1)
    found = head_logprobs(hidden_ND, head, targets_N, temperature_N, with_entropy=True, chunk_bytes=NARROWEST)
    assert_near(found[0], right[0], 1e-5)
    leaves = list(model.parameters())  # a tied weight is one of them, and has two gradients added
    for one, other in zip(gradients(*found, leaves), gradients(*right, leaves), strict=True):
        assert (one - other).abs().max().item() <= 1e-5 * max(1.0, other.abs().max().item())


class OddHead(torch.nn.Linear):
    """A subclass that computes what Linear does, as an adapter does before it has learned anything."""


def test_a_head_that_cannot_be_reproduced_gives_none() -> None:
    model = build(qwen2())
    assert split_head(model) is not None
    # Something between the trunk and the head that no configuration tells of.
    model.lm_head.register_forward_hook(lambda module, arguments, output: output * 1.01)
    assert split_head(model) is None

    model = build(qwen2())
    model.lm_head = OddHead(32, BYTES, bias=False)
    assert split_head(model) is None


@pytest.mark.parametrize("zero", ["lm_head.weight", "model.norm.weight"])
def test_logits_that_are_all_0_prove_nothing(zero: str) -> None:
    model = build(qwen2())
    with torch.no_grad():
        model.get_parameter(zero).zero_()
    assert split_head(model) is None


def test_a_softcap_too_high_to_show_at_first_is_not_overlooked() -> None:
    # In a new model 30 * tanh(x / 30) is x to 1e-5: the plain head, tried first, would pass.
    model = build(Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=30.0))
    logits_BLV = model(input_ids=torch.arange(8)[None], use_cache=False).logits
    trunk, head = split_head(model) or (None, None)
    assert trunk is not None
    assert head is not None
    hidden_BLD = trunk(input_ids=torch.arange(8)[None], use_cache=False).last_hidden_state
    assert (hidden_BLD @ head.weight_VD.t() - logits_BLV).abs().max() <= 1e-4 * logits_BLV.abs().max()
    assert head.softcap == 30.0
