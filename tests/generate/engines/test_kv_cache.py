import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3NextConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo.errors import EngineError
from grpo.generate.engines.kv_cache import GrowingLayer, Move, move_rows, new_cache


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


def test_the_last_rows_that_stay_take_the_places_of_those_that_leave() -> None:
    # Rows 0, 2 and 4 leave: of the first three, 0 and 2; so 3 and 5 take their places.
    move = Move.out(torch.tensor([True, False, True, False, True, False]))
    assert (move.num_left, move.from_M.tolist(), move.to_M.tolist()) == (3, [3, 5], [0, 2])
    assert move.apply(torch.tensor([10, 11, 12, 13, 14, 15])).tolist() == [13, 11, 15]
    everyone, no_one = Move.out(torch.ones(3, dtype=torch.bool)), Move.out(torch.zeros(3, dtype=torch.bool))
    assert everyone.apply(torch.arange(3)).tolist() == []
    assert no_one.apply(torch.arange(3)).tolist() == [0, 1, 2]


def test_rows_leave_every_kind_of_layer() -> None:
    config = Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=3
    )
    cache = new_cache(config, max_new_tokens=8)
    for layer in range(2):
        prompts = torch.arange(4.0).view(4, 1, 1, 1).repeat(1, 1, 5, 1)  # a row holds its own number
        cache.update(prompts, prompts + 10, layer)
        cache.update(prompts[:, :, :1], prompts[:, :, :1] + 10, layer)
    move_rows(cache, Move.out(torch.tensor([False, True, False, False])))
    token = torch.tensor([0.0, 3.0, 2.0]).view(3, 1, 1, 1)  # row 3 took the place of row 1
    for layer, num_positions in [(0, 3), (1, 7)]:
        keys, values = cache.update(token, token + 10, layer)
        assert keys[:, 0, :, 0].tolist() == [[row] * num_positions for row in (0.0, 3.0, 2.0)]
        assert values[:, 0, :, 0].tolist() == [[row + 10] * num_positions for row in (0.0, 3.0, 2.0)]


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
