"""tree_attention: attention of trees on a CPU. A token meets its prompt and its own past, and nothing else.

Under a mask, sdpa computes what the mask hides: more than half of it here. So each tree is done in parts by
torch's own kernel. On a GPU flex_attention does it.
Shapes: S sequences, H heads, L tokens of a sequence, D head dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from grpo.models.attention import refuse_others

NAME = "grpo_trees"  # of the attention function
# The kernel behind scaled_dot_product_attention, which does not give the sums of exponentials.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_Index = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Place:
    """Where a tree is: its sequence, its prompt there, and its responses, one behind another."""

    sequence: int
    prompt: slice
    responses: tuple[slice, ...]

    def at(self, tokens: slice) -> _Index:
        """The index of tokens of its sequence in [S, H, L, D]."""
        return slice(self.sequence, self.sequence + 1), slice(None), tokens


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    trees: list[Place],
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [S, heads, L, D], key and value of as many heads or a divisor -> [S, L, heads, D of value].

    Tokens of no tree (padding) get 0. Raises TypeError for an argument that would change the result.
    """
    refuse_others(NAME, {**others, "attention_mask": attention_mask})
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    width = value.shape[-1]
    heads, dimension = query.shape[1], max(query.shape[-1], width)
    query_SHLD, key_SHLD, value_SHLD = (_same_shape(x, heads, dimension) for x in (query, key, value))
    found_SHLD = _TreeAttention.apply(query_SHLD, key_SHLD, value_SHLD, trees, scale)  # type: ignore[no-untyped-call]
    return found_SHLD[..., :width].transpose(1, 2).contiguous(), None


class _TreeAttention(torch.autograd.Function):
    """The prompt, each response with itself, and all responses with the prompt.

    Softmaxes over parts of the keys make one over all of them by their sums of exponentials; backward, the
    sum over all keys makes each part's gradient that of the whole (FlashAttention, arXiv 2205.14135, 3.1).
    """

    @staticmethod
    def forward(
        ctx: Any, query_SHLD: Tensor, key_SHLD: Tensor, value_SHLD: Tensor, trees: list[Place], scale: float
    ) -> Tensor:
        found_SHLD = _zeros_of_token_major(query_SHLD)
        dtype = torch.promote_types(query_SHLD.dtype, torch.float32)
        logsumexp_SHL = query_SHLD.new_zeros(query_SHLD.shape[:3], dtype=dtype)
        for here, there, own in _parts(trees):
            inputs = query_SHLD[here], key_SHLD[there], value_SHLD[there]
            new_SHLD, new_SHL = _attend(*inputs, is_causal=own, scale=scale)
            if not own:  # the queries have met their own keys already
                sum_SHL = torch.logaddexp(logsumexp_SHL[here], new_SHL)
                share_SHL1 = (new_SHL - sum_SHL).exp()[..., None]  # both are finite: a query meets some key
                new_SHLD = torch.lerp(found_SHLD[here].to(dtype), new_SHLD.to(dtype), share_SHL1)
                new_SHL = sum_SHL
            found_SHLD[here] = new_SHLD
            logsumexp_SHL[here] = new_SHL
        ctx.save_for_backward(query_SHLD, key_SHLD, value_SHLD, found_SHLD, logsumexp_SHL)
        ctx.trees, ctx.scale = trees, scale
        return found_SHLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SHLD: Tensor) -> tuple[Tensor | None, ...]:
        query_SHLD, key_SHLD, value_SHLD, found_SHLD, logsumexp_SHL = ctx.saved_tensors
        grads = [_zeros_of_token_major(x) for x in (query_SHLD, key_SHLD, value_SHLD)]
        for here, there, own in _parts(ctx.trees):
            inputs = query_SHLD[here], key_SHLD[there], value_SHLD[there]
            outputs = found_SHLD[here], logsumexp_SHL[here]
            found = _attend_backward(grad_SHLD[here], *inputs, *outputs, 0.0, own, scale=ctx.scale)
            for grad, place, more in zip(grads, (here, there, there), found, strict=True):
                grad[place] += more
        return (*grads, None, None)


def _parts(trees: list[Place]) -> Iterator[tuple[_Index, _Index, bool]]:
    """Queries, the keys they meet, and whether those are their own: then each meets those up to itself."""
    for tree in trees:
        for branch in (tree.prompt, *tree.responses):
            if branch.stop > branch.start:  # the kernel divides by it
                yield tree.at(branch), tree.at(branch), True
        yield tree.at(slice(tree.prompt.stop, tree.responses[-1].stop)), tree.at(tree.prompt), False


def _same_shape(x_SHLD: Tensor, heads: int, dimension: int) -> Tensor:
    """A head of keys and values for each of the queries', which share them in groups; zeros added to D."""
    if x_SHLD.shape[1] < heads:
        x_SHLD = x_SHLD.repeat_interleave(heads // x_SHLD.shape[1], dim=1)
    missing = dimension - x_SHLD.shape[-1]
    return pad(x_SHLD, (0, missing)) if missing else x_SHLD  # zeros change no product


def _zeros_of_token_major(like_SHLD: Tensor) -> Tensor:
    """[S, H, L, D] of zeros, in memory token by token, as the layers before and after have it."""
    return torch.zeros_like(like_SHLD.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
