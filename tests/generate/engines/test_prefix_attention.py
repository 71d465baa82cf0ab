from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import WIDTHS
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from grpo.generate.engines.kv_cache import Move, new_cache
from grpo.generate.engines.prefix_attention import NAME, Prefix, prefix_attention, takes_prefix
from grpo.generate.engines.protocol import Request, Sampling, group_seed
from grpo.generate.engines.tail import Tail
from grpo.generate.engines.transformers_engine import sample_batch, score
from grpo.models.attention import attending

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    **WIDTHS,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
    "pad_token_id": 3,
}
GPT2 = GPT2Config(
    vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=3, bos_token_id=3
)
NEOX = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
TAKEN: dict[str, Any] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mixtral": MixtralConfig(**SIZES, sliding_window=None, num_local_experts=2),
    "gpt2": GPT2,
    "gpt_neox": GPTNeoXConfig(**NEOX, bos_token_id=3),
}
NOT_TAKEN: dict[str, Any] = {
    "window": MistralConfig(**SIZES, sliding_window=6),
    "some windows": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "values joined after the cache": DiffLlamaConfig(**SIZES),
}


def built(config: Any, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    auto_class: Any = AutoModelForCausalLM
    model = auto_class.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # far from uniform
    return model


def requests() -> list[Request]:
    generator = np.random.default_rng(0)
    shapes = [(9, 4), (1, 5), (17, 4), (3, 2), (9, 4)]  # prompt tokens, samples
    return [
        Request(group, generator.integers(4, 40, length).tolist(), range(seed, seed + num_samples))
        for group, (length, num_samples) in enumerate(shapes)
        for seed in [group_seed(0, 0, group)]
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("family", TAKEN)
def test_shared_prompts_give_the_samples_of_copied_ones(family: str, temperature: float) -> None:
    model = built(TAKEN[family])
    assert takes_prefix(model)
    sampling, eos_ids = Sampling(temperature, 14), frozenset([3, 7, 11, 19])
    shared, copied = (
        sample_batch(model, requests(), sampling, eos_ids, lambda *_: None, shares_prompts, Tail())
        for shares_prompts in (True, False)
    )
    lengths = set()
    for ours, theirs in zip(shared, copied, strict=True):
        for our, their in zip(ours.samples, theirs.samples, strict=True):
            assert our.token_ids.tolist() == their.token_ids.tolist()
            assert np.abs(our.logprobs - their.logprobs).max() <= 1e-5
            lengths.add(len(our.token_ids))
    assert len(lengths) > 1  # rows, and prompts with their last row, left at different times


@pytest.mark.parametrize("attention", NOT_TAKEN)
def test_other_attention_is_not_taken(attention: str) -> None:
    model = built(NOT_TAKEN[attention])
    before = model.config._attn_implementation
    assert not takes_prefix(model)
    assert model.config._attn_implementation == before


def test_eager_attention_is_not_taken() -> None:
    assert not takes_prefix(built(TAKEN["llama"], "eager"))


def test_an_argument_that_changes_the_result_is_refused() -> None:
    module: Any = torch.nn.Module()
    tensor = torch.zeros(1, 1, 1, 1)
    prefix = Prefix(filled_cache(), filled_cache(), None, torch.zeros(1, dtype=torch.int64))
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        with pytest.raises(TypeError, match=f"^grpo_prefix takes no {name}$"):
            prefix_attention(module, tensor, tensor, tensor, None, prefix, 1.0, **{name: 1.0})
    with pytest.raises(TypeError, match=r"^grpo_prefix takes no attention_mask$"):
        prefix_attention(module, tensor, tensor, tensor, tensor, prefix, 1.0)
    module.layer_idx = 0
    with pytest.raises(
        TypeError, match=r"^prefix_attention takes no keys and values but those of the cache$"
    ):
        prefix_attention(module, tensor, tensor, tensor, None, prefix, 1.0)


def test_the_attention_of_the_model_is_restored() -> None:
    model = built(TAKEN["qwen2"])
    sequences = [[5, 6, 7], [8, 9]]
    before = [score(model, sequence).tolist() for sequence in sequences]

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_batch(model, requests(), Sampling(1.0, 4), frozenset(), interrupt, True, Tail())
    assert model.config._attn_implementation == "sdpa"
    assert [score(model, sequence).tolist() for sequence in sequences] == before
    with attending(model, NAME, prefix_attention):
        assert model.config._attn_implementation != "sdpa"
    assert model.config._attn_implementation == "sdpa"


def filled_cache() -> Any:
    """Two prompts of two positions, one head of one dimension; prompt 1 starts with padding."""
    cache = new_cache(LlamaConfig(num_hidden_layers=1), max_new_tokens=4)
    keys = torch.tensor([[log(2), log(3)], [50.0, log(5)]]).view(2, 1, 2, 1)
    cache.update(keys, torch.tensor([[1.0, 2.0], [99.0, 4.0]]).view(2, 1, 2, 1), 0)
    return cache


def test_a_row_finds_its_own_prompt_and_response() -> None:
    visible_PL = torch.tensor([[True, True], [False, True]])
    prefix = Prefix(filled_cache(), filled_cache(), visible_PL, torch.tensor([0, 1, 0]))
    query = torch.tensor([1.0, 1.0, 2.0]).view(3, 1, 1, 1)
    keys = torch.tensor([0.0, log(3), 0.0]).view(3, 1, 1, 1)
    values = torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1, 1)
    # exp(query * key) are the weights: (2 * 1 + 3 * 2 + 1 * 10) / 6 = 3; (5 * 4 + 3 * 20) / 8 = 10;
    # with query 2 they are squared: (4 * 1 + 9 * 2 + 1 * 30) / 14 = 52 / 14.
    found = prefix.attend(0, query, keys, values)
    assert found.flatten().tolist() == pytest.approx([3.0, 10.0, 52 / 14])
    # Row 0 leaves, row 2 takes its place.
    prefix.leave(Move.out(torch.tensor([True, False, False])))
    found = prefix.attend(0, query[[2, 1]], keys[[2, 1]], values[[2, 1]])
    assert found.flatten().tolist() == pytest.approx([52 / 14, 10.0])
    # It leaves as well, and prompt 0 with it: prompt 1 takes its place.
    prefix.leave(Move.out(torch.tensor([True, False])))
    assert prefix.layers[0][0].flatten().exp().tolist() == pytest.approx([exp(50), 5.0])
    found = prefix.attend(0, query[[1]], keys[[1]], values[[1]])
    assert found.flatten().tolist() == pytest.approx([10.0])
