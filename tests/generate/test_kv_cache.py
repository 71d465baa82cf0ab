import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3NextConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo.errors import EngineError
from grpo.generate.kv_cache import GrowingLayer, new_cache


def test_a_growing_layer_holds_what_a_dynamic_layer_does() -> None:
    generator = torch.Generator().manual_seed(0)
    growing, dynamic = GrowingLayer(spare_positions=2), DynamicLayer()  # type: ignore[no-untyped-call]
    rows = 2
    # A prompt of 3, then tokens one by one past the room of 2, with rows repeated and dropped in between.
    for num_new, select in [
        (3, [0, 0, 1]),
        (1, None),
        (1, None),
        (1, [2, 0]),
        (1, None),
        (1, [1]),
        (4, None),
    ]:
        keys, values = torch.rand(2, rows, 2, num_new, 4, generator=generator)
        for ours, theirs in zip(growing.update(keys, values), dynamic.update(keys, values), strict=True):
            assert torch.equal(ours, theirs)
        if select is not None:
            growing.batch_select_indices(torch.tensor(select))
            dynamic.batch_select_indices(torch.tensor(select))
            rows = len(select)
        assert growing.get_seq_length() == dynamic.get_seq_length()


def test_room_is_made_once_for_several_tokens() -> None:
    layer = GrowingLayer(spare_positions=4)
    token = torch.zeros(1, 1, 1, 2)
    layer.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    addresses = [layer.update(token, token)[0].data_ptr() for _ in range(4)]
    assert len(set(addresses)) == 1
    assert layer.room is not None
    assert layer.room[0].shape == (1, 1, 3 + 4, 2)


def test_layers_by_model() -> None:
    full = new_cache(LlamaConfig(num_hidden_layers=2), max_new_tokens=8)
    assert [type(layer) for layer in full.layers] == [GrowingLayer, GrowingLayer]
    assert [layer.spare_positions for layer in full.layers if isinstance(layer, GrowingLayer)] == [8, 8]
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    mixed = new_cache(config, max_new_tokens=8)
    assert [type(layer) for layer in mixed.layers] == [DynamicSlidingWindowLayer, GrowingLayer]


def test_a_recurrent_state_is_refused() -> None:
    with pytest.raises(
        EngineError, match=r"generate: qwen3_next keeps a LinearAttentionLayer, .* engine: vllm"
    ):
        new_cache(Qwen3NextConfig(), max_new_tokens=8)
