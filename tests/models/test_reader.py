"""The reader on tiny models of many kinds: where their head is found, and what one forward gives."""

from typing import Any

import pytest
import torch
from tests.models.test_head import NARROWEST, assert_near, gradients
from tests.tiny import BYTES, WIDTHS, qwen2
from torch import nn
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

from grpo.models.head import head_logprobs
from grpo.models.logprobs import token_logprobs
from grpo.models.reader import Reader, split_head
from grpo.models.weight_check import measure

TINY: dict[str, Any] = {
    "vocab_size": BYTES,
    **WIDTHS,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


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


# ---- one forward ----

PLACES_N, TARGETS_N = torch.tensor([0, 3, 12, 19]), torch.tensor([5, 6, 7, 8])
INPUTS: dict[str, Any] = {"input_ids": torch.arange(0, 60, 3).view(2, 10), "use_cache": False}


@pytest.mark.parametrize("has_head", [True, False])
def test_one_forward_gives_the_logprobs_of_the_models_own_logits(has_head: bool) -> None:
    model = build(qwen2(tie_word_embeddings=True))
    reader = Reader(model)
    assert reader.form == (1.0, None)
    if not has_head:
        reader.form = None
    temperature_N = torch.tensor([1.0, 0.5, 2.0, 1.0])
    logits_NV = model(**INPUTS).logits.flatten(0, 1)[PLACES_N]
    right = token_logprobs(logits_NV, TARGETS_N, temperature_N, with_entropy=True)
    found = reader(INPUTS, PLACES_N, TARGETS_N, temperature_N, with_entropy=True)
    for one, other in zip(found, right, strict=True):
        assert one is not None
        assert other is not None
        assert_near(one, other, 1e-5)


class Sharded:
    """Parameters that are whole only while `module` is called, and new ones each time, as FSDP2's are."""

    def __init__(self, module: nn.Module) -> None:
        self.whole = {name: p.detach() for name, p in module.named_parameters()}
        self.fill(module, whole=False)
        module.register_forward_pre_hook(lambda module, arguments: self.fill(module, whole=True))
        module.register_forward_hook(lambda module, arguments, output: self.fill(module, whole=False))

    def fill(self, module: nn.Module, *, whole: bool) -> None:
        for name, tensor in self.whole.items():
            owner, _, last = name.rpartition(".")
            value = tensor if whole else torch.empty(0)
            setattr(module.get_submodule(owner), last, nn.Parameter(value))


def test_every_weight_is_used_within_the_forward() -> None:
    model = build(qwen2())
    reader, ones_N = Reader(model), torch.ones(4)
    right_N, _ = reader(INPUTS, PLACES_N, TARGETS_N, ones_N)
    sequences = [[1, 2, 3, 4], [5, 6, 7, 8]]
    probe = measure(reader, sequences)
    sharded = Sharded(reader)
    found_N, _ = reader(INPUTS, PLACES_N, TARGETS_N, ones_N)
    assert torch.equal(found_N, right_N)
    assert measure(reader, sequences) == probe
    with pytest.raises((RuntimeError, AssertionError)):  # the bare model has no weights out here
        model(**INPUTS)
    # What is trained is the weight that was used: after a change, the head's is another.
    sharded.whole["model.lm_head.weight"] = sharded.whole["model.lm_head.weight"] * 2
    other_N, _ = reader(INPUTS, PLACES_N, TARGETS_N, ones_N)
    assert (other_N - right_N).abs().max() > 0.01
