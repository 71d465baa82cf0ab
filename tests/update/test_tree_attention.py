"""Attention in parts against sdpa under the whole mask."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.update.examples import tree_mask
from torch import Tensor

from grpo.update.batch import Rollouts
from grpo.update.layout import PADDING, MicroBatch, build, tree_of
from grpo.update.tree_attention import tree_attention

MODULE: Any = SimpleNamespace()


def make_batch() -> MicroBatch:
    """Two trees of (prompt, responses) 5, 3 1 7 and 1, 2; and one of 40, 33 in a sequence of its own."""
    sizes = [(5, [3, 1, 7]), (1, [2]), (40, [33])]
    prompts = [np.arange(size) for size, lengths in sizes for _ in lengths]
    responses = [np.arange(length) for _, lengths in sizes for length in lengths]
    rollouts = Rollouts(
        keys=np.array(
            [[0, tree, row] for tree, (_, lengths) in enumerate(sizes) for row in range(len(lengths))]
        ),
        prompts=prompts,
        responses=responses,
        masks=[np.ones(len(response), dtype=bool) for response in responses],
        old_logprobs=[np.zeros(len(response), dtype=np.float32) for response in responses],
        advantages=np.zeros(5),
        temperatures=np.ones(5),
    )
    first, second, third = (tree_of(rollouts, rows) for rows in ([0, 1, 2], [3], [4]))
    return build(rollouts, [[third], [first, second]], "cpu")


def draw(batch: MicroBatch, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Any:
    """Query, key and value; shape: heads, heads of keys, their dimension, that of values."""
    heads, key_heads, dimension, width = shape
    sequences, length = batch.input_ids_SL.shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, dimension, 3.0), (key_heads, dimension, 3.0), (key_heads, width, 1.0))
    return tuple(
        (size * torch.randn(sequences, length, n, d, generator=generator))
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for n, d, size in sizes
    )


def attend(batch: MicroBatch, inputs: Any, **others: Any) -> tuple[Tensor, None]:
    query, key, value = inputs
    return tree_attention(MODULE, query, key, value, trees=batch.trees, **{"attention_mask": None, **others})


def dense(batch: MicroBatch, inputs: Any, scale: float | None = None) -> Tensor:
    query, key, value = inputs
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=tree_mask(batch), scale=scale, enable_gqa=True
    )
    return found.transpose(1, 2)


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("shape", [(4, 4, 8, 8), (4, 2, 16, 16), (6, 1, 12, 8), (2, 2, 8, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 3e-14)])
def test_parts_make_the_whole(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int, int], scale: float | None
) -> None:
    batch = make_batch()
    inputs = draw(batch, shape, dtype)
    found, none = attend(batch, inputs, scaling=scale, dropout=0.0)
    assert none is None
    expected = dense(batch, inputs, scale)
    real = batch.tree_SL != PADDING
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert (found - expected)[real].abs().max() <= tolerance
    assert not found[~real].any()  # garbage there, times a gradient of 0, would be NaN
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    upstream *= real[..., None, None]
    mine = torch.autograd.grad(found, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for ours, other in zip(mine, theirs, strict=True):
        assert (ours - other).norm() <= tolerance * other.norm()


def test_under_autocast_the_products_are_in_its_type() -> None:
    batch = make_batch()
    inputs = draw(batch, (4, 2, 16, 16), torch.float32)
    expected = dense(batch, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = attend(batch, inputs)
        doubles, _ = attend(batch, [x.double() for x in inputs])
    assert (found.dtype, doubles.dtype) == (torch.bfloat16, torch.float64)
    real = batch.tree_SL != PADDING
    error = (found - expected)[real].norm() / expected[real].norm()
    assert 1e-4 < error < 2e-2  # bfloat16 has 8 bits: 4e-3
    grads = torch.autograd.grad(found.float().square().sum(), inputs)
    exact = torch.autograd.grad(expected[real].square().sum(), inputs)
    for ours, other in zip(grads, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - other).norm() <= 3e-2 * other.norm()


@pytest.mark.parametrize("name", ["attention_mask", "sliding_window", "softcap", "s_aux"])
def test_an_argument_that_would_change_the_result_is_refused(name: str) -> None:
    batch = make_batch()
    with pytest.raises(TypeError, match=rf"^grpo_trees takes no {name}$"):
        attend(batch, draw(batch, (1, 1, 8, 8), torch.float32), **{name: 4})
