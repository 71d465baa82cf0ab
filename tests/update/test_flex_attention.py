"""Trees as a GPU reads them, on a CPU: the same mask, one dtype, few graphs. Only the kernel is another."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from tests.update.test_network import make_network, make_rollouts
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as kernel

from grpo.update import flex_attention
from grpo.update.batch import Rollouts
from grpo.update.flex_attention import BLOCK, MULTIPLE, block_mask
from grpo.update.layout import Tree, build, groups_of, plan, tree_of
from grpo.update.network import Network
from grpo.update.tree_attention import Place

SHAPES = [(20, [150, 130, 90]), (140, [9, 7]), (100, [60])]


def on_a_gpu(kind: str = "Qwen3", precision: str = "float32") -> Network:
    """Reads as on a GPU; where it computes is a CPU. Qwen3 has norms of queries and keys."""
    model = make_network(kind, {"head_dim": 8} if kind == "Qwen3" else {}).model
    network = Network(model, precision, share_prompts=True)
    network.flex = True
    network.use("shared")
    return network


def all_trees(rollouts: Rollouts) -> list[Tree]:
    return [tree_of(rollouts, group) for group in groups_of(rollouts, np.arange(len(rollouts)))]


def random_trees(draw: np.random.Generator) -> tuple[list[Place], int]:
    """Trees behind each other, and how many tokens they have."""
    trees, end = [], 0
    for _ in range(draw.integers(1, 6)):
        lengths = [draw.integers(1, 300), *draw.integers(0, 200, size=draw.integers(1, 5))]
        ends = (end + np.cumsum(lengths)).tolist()
        parts = [slice(start, stop) for start, stop in zip([end, *ends], ends, strict=False)]
        trees.append(Place(0, parts[0], tuple(parts[1:])))
        end = ends[-1]
    return trees, end


def test_the_blocks_are_those_that_torch_finds_in_the_whole_mask() -> None:
    draw = np.random.default_rng(0)
    for _ in range(40):
        trees, end = random_trees(draw)
        length = -(-end // MULTIPLE) * MULTIPLE
        found = block_mask(trees, length, "cpu")
        expected = create_block_mask(found.mask_mod, 1, None, length, length, device="cpu")
        assert torch.equal(found.to_dense(), expected.to_dense())
        assert torch.equal(found.kv_num_blocks, expected.kv_num_blocks)
        wholes = (found.full_kv_num_blocks, expected.full_kv_num_blocks)
        assert wholes[0] is not None
        assert wholes[1] is not None
        assert torch.equal(wholes[0], wholes[1])


def test_a_token_sees_what_it_sees_in_the_mask_of_trees() -> None:
    rollouts = make_rollouts(SHAPES)
    batch = build(rollouts, [all_trees(rollouts)], "cpu", MULTIPLE)
    length = batch.input_ids_SL.shape[1]
    assert length == 1024  # of 706 tokens
    sees = block_mask(batch.trees, length, "cpu").mask_mod
    index = torch.arange(length)
    found_LL = sees(torch.tensor(0), torch.tensor(0), index[:, None], index[None])
    tree, branch = batch.tree_SL[0], batch.branch_SL[0]
    own = (branch[None] == 0) | (branch[None] == branch[:, None])
    expected_LL = (index[:, None] >= index[None]) & (tree[:, None] == tree[None]) & own
    assert torch.equal(found_LL, expected_LL)
    assert bool(found_LL.any(dim=1).all())  # a token that saw nothing would be NaN


def test_a_long_mask_takes_no_memory() -> None:
    trees = [Place(0, slice(0, 100), tuple(slice(100 + 2000 * i, 2100 + 2000 * i) for i in range(8)))]
    tracemalloc.start()
    try:
        mask = block_mask(trees, 2**14, "cpu")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20  # torch takes 22 bytes for each pair of tokens: 5.6 GiB
    assert mask.shape[-2:] == (2**14, 2**14)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "GPT2"])
def test_it_computes_what_the_attention_of_a_cpu_does(kind: str) -> None:
    # Not compiled: the same in a second instead of twenty. On a CPU it has no backward pass.
    rollouts, gpu = make_rollouts(SHAPES), on_a_gpu(kind)
    sequences = [all_trees(rollouts)]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found_N, _ = gpu.logprobs(gpu.batch(rollouts, sequences))
        gpu.flex = False
        gpu.use("shared")
        expected_N, _ = gpu.logprobs(gpu.batch(rollouts, sequences))
    assert (found_N - expected_N).abs().max() <= 5e-5


def test_under_autocast_queries_keys_and_values_are_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[torch.dtype]] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Any:
        seen.append({query.dtype, key.dtype, value.dtype})
        return kernel(query, key, value, **how)

    monkeypatch.setattr(flex_attention, "compiled", lambda: spy)
    gpu, rollouts = on_a_gpu(precision="bfloat16"), make_rollouts(SHAPES)
    batch = gpu.batch(rollouts, [all_trees(rollouts)])
    with torch.no_grad():
        found_N, _ = gpu.logprobs(batch)
        exact_N, _ = gpu.logprobs(batch, exactly=True)
    layers = len(seen) // 2
    assert seen == [{torch.bfloat16}] * layers + [{torch.float32}] * layers
    assert (found_N - exact_N).abs().mean() <= 0.05


def test_few_graphs_are_compiled_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond torch's recompile_limit it would run unfused and say nothing."""
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    # Which vLLM on a CPU sets.
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    compiled = torch.compile(kernel, backend=count, dynamic=True)
    monkeypatch.setattr(flex_attention, "compiled", lambda: compiled)
    networks = [on_a_gpu(), on_a_gpu(precision="bfloat16")]
    draw = np.random.default_rng(1)
    for turn in range(12):
        shapes = [(int(draw.integers(5, 300)), draw.integers(1, 300, size=3).tolist()) for _ in range(2)]
        rollouts, network = make_rollouts(shapes), networks[turn % 2]
        batch = network.batch(rollouts, [all_trees(rollouts)])
        with torch.no_grad():
            network.logprobs(batch)
    assert 0 < graphs <= 4
    torch._dynamo.reset()


def test_sequences_come_alone_and_in_few_lengths() -> None:
    rollouts = make_rollouts([(30, [400, 20, 170])] * 9)
    network = on_a_gpu()
    batches = plan(rollouts, np.arange(len(rollouts)), 2100, "shared", network.cost)
    assert sorted(row for [sequence] in batches for tree in sequence for row in tree.rows) == [*range(27)]
    lengths = [network.batch(rollouts, sequences).input_ids_SL.shape for sequences in batches]
    assert lengths == [(1, 2048)] * 3
    assert MULTIPLE % BLOCK == 0
