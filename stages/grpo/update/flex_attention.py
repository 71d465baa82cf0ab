"""flex_attention: attention of trees on a GPU, by torch's flex_attention under a mask of blocks.

Compiled once for each type, with gradient and without: sequences come one at a time and in lengths that are
multiples of MULTIPLE, for beyond torch's recompile_limit it would run unfused, in [H, L, L], without a word.
Shapes: H heads, L tokens of a sequence, D head dimension, B blocks of BLOCK tokens.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from grpo.models.attention import refuse_others
from grpo.update.tree_attention import Place

NAME = "grpo_flex"  # of the attention function
BLOCK = 128  # tokens, as the kernel has them
MULTIPLE = 512


def flex_tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    block_mask: BlockMask,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, L, D], key and value of as many heads or a divisor -> [1, L, heads, D].

    Under autocast all three are cast to its type here: norms and rotary embeddings leave queries and keys
    wider than values, and flex's own cast is not everywhere. Raises TypeError for an argument that would
    change the result.
    """
    refuse_others(NAME, {**others, "attention_mask": attention_mask})
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    grouped = key.shape[1] != query.shape[1]
    found = compiled()(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=grouped)
    return found.transpose(1, 2).contiguous(), None


@cache
def compiled() -> Any:
    """flex_attention, compiled; a shape too many is an error, of this function alone: vLLM compiles too."""
    strict = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    return strict(torch.compile(flex_attention, dynamic=True))


def block_mask(trees: Sequence[Place], length: int, device: str) -> BlockMask:
    """What the tokens of one sequence of trees see, of `length`, a multiple of BLOCK; padding sees padding.

    Blocks are found from where trees begin and end. torch's create_block_mask makes [L, L] tensors for it: 22
    bytes for each pair of tokens, 5.6 GiB at 16,384.
    """
    prompt_L2, own_L2 = _seen(trees, length)
    seen_BB, whole_BB = _blocks(prompt_L2, own_L2)
    tree_L, branch_L = (torch.from_numpy(own).to(device) for own in _names(trees, length))

    def sees(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (branch_L[key] == 0) | (branch_L[key] == branch_L[query])
        return (query >= key) & (tree_L[query] == tree_L[key]) & own

    lists = (*_listed(seen_BB & ~whole_BB), *_listed(whole_BB))
    partly, parts, wholly, wholes = (torch.from_numpy(each).to(device)[None, None] for each in lists)
    return BlockMask.from_kv_blocks(
        partly, parts, wholly, wholes, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _seen(trees: Sequence[Place], length: int) -> tuple[np.ndarray, np.ndarray]:
    """For each token two ranges of those it sees, [L, 2] each: of its prompt, and of its branch to itself.

    One range, the second, where they adjoin.
    """
    prompt_L2 = np.zeros((length, 2), dtype=np.int64)
    own_L2 = np.stack([np.zeros(length, dtype=np.int64), np.arange(length) + 1], axis=1)
    end = 0
    for tree in trees:
        own_L2[tree.prompt, 0] = tree.prompt.start
        for response in tree.responses:
            adjoins = response.start == tree.prompt.stop
            own_L2[response, 0] = tree.prompt.start if adjoins else response.start
            if not adjoins:
                prompt_L2[response] = tree.prompt.start, tree.prompt.stop
        end = tree.responses[-1].stop
    own_L2[end:, 0] = end
    return prompt_L2, own_L2


def _blocks(*ranges_L2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, B] of queries and keys: whether any pair of a block is seen, and whether all are."""
    num_blocks = len(ranges_L2[0]) // BLOCK
    of_query_L = np.repeat(np.arange(num_blocks), BLOCK)
    # Where a range of blocks begins, 1 more; behind its end, 1 fewer: the sums along a row count the ranges.
    any_BB, all_BB = (np.zeros((num_blocks, num_blocks + 1), dtype=np.int64) for _ in range(2))
    for range_L2 in ranges_L2:
        begin_L, end_L = range_L2[:, 0], range_L2[:, 1]
        there_L = end_L > begin_L
        inner_L = there_L & (end_L // BLOCK > -(-begin_L // BLOCK))
        for counts_BB, here_L, first_L, last_L in (
            (any_BB, there_L, begin_L // BLOCK, -(-end_L // BLOCK)),
            (all_BB, inner_L, -(-begin_L // BLOCK), end_L // BLOCK),
        ):
            np.add.at(counts_BB, (of_query_L[here_L], first_L[here_L]), 1)
            np.subtract.at(counts_BB, (of_query_L[here_L], last_L[here_L]), 1)
    return any_BB.cumsum(axis=1)[:, :-1] > 0, all_BB.cumsum(axis=1)[:, :-1] == BLOCK


def _names(trees: Sequence[Place], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of each token's tree and branch, int32 [L]: 0 the prompt, -1 the tree of padding."""
    tree_L, branch_L = np.full(length, -1, dtype=np.int32), np.zeros(length, dtype=np.int32)
    for number, tree in enumerate(trees):
        for branch, tokens in enumerate((tree.prompt, *tree.responses)):
            tree_L[tokens], branch_L[tokens] = number, branch
    return tree_L, branch_L


def _listed(blocks_BB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how many key blocks of each query block are marked, int32 [B]; these first, int32 [B, B])."""
    order_BB = np.argsort(~blocks_BB, axis=1, kind="stable")
    return blocks_BB.sum(axis=1).astype(np.int32), order_BB.astype(np.int32)
