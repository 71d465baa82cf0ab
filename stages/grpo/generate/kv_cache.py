"""kv_cache: the keys and values of the positions a batch has seen, in layers that can be repeated and cut.

transformers' DynamicLayer copies the whole cache for each new token; GrowingLayer keeps room for the next
ones. A layer that also holds a recurrent state is refused: left padding would run through that state.

Shapes: N rows, H heads, S positions, D head dimension.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from grpo.errors import EngineError

SPARE_POSITIONS = 64  # room made at once: a copy of the cache every 64 tokens, and little memory unused


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer whose keys and values are the used part of larger tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.room: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Append keys and values [N, H, S, D]; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        start = self.get_seq_length()
        end = start + keys.shape[-2]
        if self.room is None or self.room[0].shape[-2] < end:
            self.room = _enlarge(self.keys, keys, end), _enlarge(self.values, values, end)
        for room, new in zip(self.room, (keys, values), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = self.room[0][:, :, :end], self.room[1][:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        super().batch_select_indices(indices)
        self.room = None  # of the old rows


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model. Raises EngineError where one of its layers cannot be repeated and cut."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer()
        elif type(layer) not in (DynamicSlidingWindowLayer, DummyLayer):
            message = f"{config.model_type} keeps a {type(layer).__name__}, which cannot be batched here"
            raise EngineError(f"generate: {message}; use engine: vllm")
    return cache


def _enlarge(old: Tensor, new: Tensor, num_used: int) -> Tensor:
    rows, heads, _, dimension = new.shape
    room = new.new_empty(rows, heads, num_used + SPARE_POSITIONS, dimension)
    if old.numel():
        room[:, :, : old.shape[-2]] = old
    return room
