"""kv_cache: the keys and values of the positions a batch has seen, in layers that can be repeated and cut.

transformers' DynamicLayer copies the whole cache for each new token; GrowingLayer keeps room for the next
ones. A row that leaves is overwritten by one from the end: it costs at most the copy of one row. A layer that
also holds a recurrent state is refused: left padding would run through it.

Shapes: N rows, H heads, S positions, D head dimension.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo.errors import UnsupportedModelError

SPARE_POSITIONS = 64  # room made at once: a copy of the cache every 64 tokens, and little memory unused


@dataclass(frozen=True)
class Move:
    """Which rows overwrite which, so that the `num_left` that stay are the first ones."""

    num_left: int
    from_M: Tensor  # int64, rows that stay and stand behind the first num_left
    to_M: Tensor  # int64, rows that leave and stand among them

    @classmethod
    def out(cls, leaving_N: Tensor) -> "Move":
        """The move that makes the rows leave where leaving_N (bool) is True."""
        num_left = len(leaving_N) - int(leaving_N.sum())
        from_M = num_left + (~leaving_N[num_left:]).nonzero().squeeze(-1)
        return cls(num_left, from_M, to_M=leaving_N[:num_left].nonzero().squeeze(-1))

    def apply(self, rows: Tensor) -> Tensor:
        """Move the rows [N, ...] in place; returns those that stay, a view."""
        rows[self.to_M] = rows[self.from_M]
        return rows[: self.num_left]


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A DynamicLayer whose keys and values [N, H, S, D] are the used part of larger tensors."""

    def __init__(self, spare_positions: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spare_positions = spare_positions  # the room made at once, in tokens
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
            more = (0, 0, 0, end - 1 + self.spare_positions - used)
            self.room = pad(self.keys, more), pad(self.values, more)
        keys, values = self.room
        keys[:, :, used:end], values[:, :, used:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        super().batch_select_indices(indices)
        self.room = None  # it belongs to the old rows


def move_rows(cache: DynamicCache, move: Move) -> None:
    """Let rows leave a cache of new_cache."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if layer.is_initialized:  # else it holds no position yet
            layer.keys, layer.values = move.apply(layer.keys), move.apply(layer.values)
            if isinstance(layer, GrowingLayer) and layer.room is not None:
                keys, values = layer.room  # keys and values are a part of it: their rows have been moved
                layer.room = keys[: move.num_left], values[: move.num_left]


def new_cache(config: PreTrainedConfig, max_new_tokens: int) -> DynamicCache:
    """An empty cache for a model. Raises UnsupportedModelError where a layer cannot be repeated and cut."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer(min(SPARE_POSITIONS, max_new_tokens))
        elif type(layer) is not DynamicSlidingWindowLayer:
            message = f"{config.model_type} keeps a {type(layer).__name__}, which cannot be batched here"
            raise UnsupportedModelError(f"generate: {message}; use engine: vllm")
        elif layer.sliding_window < 1:
            message = f"{config.model_type} sees {layer.sliding_window} tokens in layer {index}"
            raise UnsupportedModelError(f"generate: {message}; sliding_window must be at least 1")
    return cache


def cache_name(model: PreTrainedModel) -> str:
    """The argument of forward() that takes the cache: `past_key_values` before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
