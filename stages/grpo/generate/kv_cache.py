"""kv_cache: the keys and values of the positions a batch has seen, in layers that can be repeated and cut.

transformers' DynamicLayer copies the whole cache for each new token; GrowingLayer keeps room for the next
ones. A layer that also holds a recurrent state is refused: left padding would run through that state.

Shapes: N rows, H heads, S positions, D head dimension.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo.errors import EngineError

SPARE_POSITIONS = 64  # room made at once: a copy of the cache every 64 tokens, and little memory unused


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A DynamicLayer whose keys and values [N, H, S, D] are the used part of larger tensors.

    spare_positions: the room made at once, in tokens.
    """

    def __init__(self, spare_positions: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spare_positions = spare_positions
        self.room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of new positions; returns those of all positions."""
        if not self.is_initialized or self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states  # the prompts: room comes with their samples
            return key_states, value_states
        used = self.keys.shape[-2]
        end = used + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < end:
            num_positions = end - 1 + self.spare_positions
            self.room = _enlarged(self.keys, num_positions), _enlarged(self.values, num_positions)
        keys, values = self.room
        keys[:, :, used:end], values[:, :, used:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        super().batch_select_indices(indices)
        self.room = None  # it belongs to the old rows


def new_cache(config: PreTrainedConfig, max_new_tokens: int) -> DynamicCache:
    """An empty cache for a model. Raises EngineError where one of its layers cannot be repeated and cut."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer(min(SPARE_POSITIONS, max_new_tokens))
        elif type(layer) is not DynamicSlidingWindowLayer:
            message = f"{config.model_type} keeps a {type(layer).__name__}, which cannot be batched here"
            raise EngineError(f"generate: {message}; use engine: vllm")
    return cache


def _enlarged(used: Tensor, num_positions: int) -> Tensor:
    rows, heads, num_used, dimension = used.shape
    room = used.new_empty(rows, heads, num_positions, dimension)
    room[:, :, :num_used] = used
    return room
