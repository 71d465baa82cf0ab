"""prefix_attention: attention of samples to their prompts, whose keys and values are kept once.

A step of decoding reads them once, not once per sample. Otherwise it is plain full attention: one softmax
over the prompt and the sample's own response. The responses come from the model's cache, the prompts from an
argument that the model hands on. For batches in which each prompt has several samples.

Shapes: P prompts, N rows (samples still in the batch), K slots of a prompt (as many as any prompt has rows;
those a prompt does not need compute row 0 again, and nobody reads them), H heads of keys and values,
R heads of queries to each, Q = K * R queries, L prompt positions, T response positions, S = L + T,
D head dimension, X any.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from grpo.generate.engines.kv_cache import GrowingLayer, Move, cache_name, new_cache
from grpo.models.attention import attending, refuse_others

NAME = "grpo_prefix"  # of the attention function; no mask is made for a name transformers does not know


class Prefix:
    """The keys and values of the prompts of a batch, and which rows continue which prompt.

    prompts, responses: of new_cache; the model fills the latter. visible_PL: not padding; None: all of it.
    """

    def __init__(
        self, prompts: DynamicCache, responses: DynamicCache, visible_PL: Tensor | None, prompt_N: Tensor
    ) -> None:
        full: list[Any] = prompts.layers
        # [P, H, D, L] and [P, H, L, D], as the matrix products on a CPU read them fastest.
        self.layers = [(x.keys.transpose(-1, -2).contiguous(), x.values.contiguous()) for x in full]
        self.responses = responses
        self.asked: set[int] = set()  # layers
        self.prompt_N = prompt_N
        self.bias_PL: Tensor | None = None  # added to the scores
        if visible_PL is not None:
            self.bias_PL = torch.zeros_like(visible_PL, dtype=torch.float32).masked_fill_(
                ~visible_PL, -torch.inf
            )
        self._assign_slots()

    def leave(self, move: Move) -> None:
        """Let rows leave, but not all, and prompts that have no row left."""
        self.prompt_N = move.apply(self.prompt_N)
        number_P = torch.arange(len(self.layers[0][0]), device=self.prompt_N.device)
        prompts = Move.out(~torch.isin(number_P, self.prompt_N))
        if prompts.num_left < len(number_P):
            number_P[prompts.from_M] = prompts.to_M
            self.prompt_N = number_P[self.prompt_N]
            self.layers = [(prompts.apply(keys), prompts.apply(values)) for keys, values in self.layers]
            self.bias_PL = None if self.bias_PL is None else prompts.apply(self.bias_PL)
        self._assign_slots()

    def attend(self, layer: int, query_NHRD: Tensor, keys_NHTD: Tensor, values_NHTD: Tensor) -> Tensor:
        """The values that scaled queries find in the prompts and the responses, [N, H, R, D]."""
        self.asked.add(layer)
        keys_PHDL, values_PHLD = self.layers[layer]
        num_positions = keys_PHDL.shape[-1]
        scores_PHQL = self._to_slots(query_NHRD) @ keys_PHDL
        if self.bias_PL is not None:
            scores_PHQL += self.bias_PL[:, None, None]
        scores_PHQT = self._to_slots(query_NHRD @ keys_NHTD.transpose(-1, -2))
        # A row always sees its own last token, so no softmax is over padding alone.
        weights_PHQS = torch.cat([scores_PHQL, scores_PHQT], -1).softmax(-1, dtype=torch.float32)
        weights_PHQS = weights_PHQS.to(values_PHLD.dtype)
        found_PHQD = weights_PHQS[..., :num_positions] @ values_PHLD
        weights_NHRT = self._to_rows(weights_PHQS[..., num_positions:])
        return self._to_rows(found_PHQD) + weights_NHRT @ values_NHTD

    def _assign_slots(self) -> None:
        rows_N = torch.arange(len(self.prompt_N), device=self.prompt_N.device)
        number_P = torch.arange(len(self.layers[0][0]), device=rows_N.device)
        num_so_far_PN = (self.prompt_N == number_P[:, None]).cumsum(1)  # rows of the prompt
        place_N = num_so_far_PN[self.prompt_N, rows_N] - 1
        self.num_slots = int(place_N.max()) + 1
        self.slot_N = self.prompt_N * self.num_slots + place_N  # of each row
        self.row_PK = rows_N.new_zeros(len(number_P) * self.num_slots)
        self.row_PK[self.slot_N] = rows_N

    def _to_slots(self, rows_NHRX: Tensor) -> Tensor:
        """[N, H, R, X] -> [P, H, Q, X]."""
        _, heads, repeats, width = rows_NHRX.shape
        slots = rows_NHRX[self.row_PK].view(-1, self.num_slots, heads, repeats, width)
        return slots.transpose(1, 2).reshape(-1, heads, self.num_slots * repeats, width)

    def _to_rows(self, slots_PHQX: Tensor) -> Tensor:
        """[P, H, Q, X] -> [N, H, R, X], back from _to_slots."""
        prompts, heads, _, width = slots_PHQX.shape
        slots = slots_PHQX.view(prompts, heads, self.num_slots, -1, width).transpose(1, 2)
        rows_NHRX: Tensor = slots.flatten(0, 1)[self.slot_N]
        return rows_NHRX


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix: Prefix,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One token per row: query [N, H * R, 1, D], key and value [N, H, T, D] -> [N, 1, H * R, D].

    prefix: an argument of the model's forward(). Raises TypeError for one that would change the result.
    """
    refuse_others(NAME, {**others, "attention_mask": attention_mask})
    assert isinstance(module.layer_idx, int)
    layer: Any = prefix.responses.layers[module.layer_idx]
    if key is not layer.keys or value is not layer.values:
        # The model changes what it takes from the cache, so the prompts would have to be changed as well.
        raise TypeError("prefix_attention takes no keys and values but those of the cache")
    rows, heads, _, dimension = key.shape
    scale = dimension**-0.5 if scaling is None else scaling
    query_NHRD = query.reshape(rows, heads, -1, dimension) * scale
    found_NHRD = prefix.attend(module.layer_idx, query_NHRD, key, value)
    return found_NHRD.reshape(rows, 1, -1, value.shape[-1]), None


@torch.inference_mode()
def takes_prefix(model: PreTrainedModel) -> bool:
    """Whether every layer of the model is plain full attention that prefix_attention computes.

    Found out by one step of decoding: what reaches an attention function is known to the model's code alone.
    """
    prompts, responses = (new_cache(model.config, max_new_tokens=1) for _ in range(2))
    full = all(type(layer) is GrowingLayer for layer in prompts.layers)
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend or not full:
        return False
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model(input_ids=token, use_cache=True, **{cache_name(model): prompts})
    prefix = Prefix(prompts, responses, None, token[0])
    try:
        with attending(model, NAME, prefix_attention):
            model(input_ids=token, position_ids=token + 1, prefix=prefix, **{cache_name(model): responses})
    except TypeError:  # a module on the way takes no such argument, or prefix_attention not all of its own
        return False
    return prefix.asked == set(range(len(prompts.layers)))
