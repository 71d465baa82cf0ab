"""The layouts on tiny models of many kinds: what goes through together equals what goes through alone."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests import tiny
from tests.update.examples import tree_mask
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from grpo.errors import UsageError
from grpo.update.batch import Rollouts, made_up_pair
from grpo.update.layout import Cost, MicroBatch, build, groups_of, longest_pair, plan, tree_of
from grpo.update.layout_check import check_layouts
from grpo.update.network import (
    CPU_TOKENS,
    MASKED_TOKENS,
    ROUNDED_TOLERANCE,
    TOLERANCE,
    Network,
    cost_of,
)

VOCAB = 50
WINDOW = 8  # of the models that have one
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
HEAD = {"head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {  # DeepSeek's attention
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTING = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
# Every layer is full attention.
FULL: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": HEAD,
    "Qwen3Moe": HEAD | EXPERTS | {"num_experts": 4},
    "Llama": {},
    "Olmo2": {},
    "Granite": {"logits_scaling": 4.0},
    "SmolLM3": {},
    "Glm4": HEAD,
    "GPT2": {},
    "GPTNeoX": {},
    "DeepseekV3": LATENT | EXPERTS | ROUTING | {"first_k_dense_replace": 1},
}
# One layer of two has a window, or both have.
HALF = {"layer_types": ["sliding_attention", "full_attention"]}
CHUNKED = {"attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"]}
WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": WINDOW},
    "Gemma3Text": HEAD | HALF | {"sliding_window": WINDOW},
    "Phi3": {"sliding_window": WINDOW},
    "Cohere2": HEAD | HALF | {"sliding_window": WINDOW},
    "Llama4Text": HEAD | CHUNKED | {"intermediate_size_mlp": 48, "num_local_experts": 2},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
}
# A state is handed from token to token.
LINEAR = {f"linear_{name}": value for name, value in (("num_key_heads", 2), ("num_value_heads", 2))}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
DENSE = {"num_experts": 0, "mlp_only_layers": [0, 1]}
RECURRENT: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 4},
    "Qwen3Next": HEAD | LINEAR | DENSE | {"layer_types": ["linear_attention", "full_attention"]},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4},
}


def make_model(kind: str, changes: dict[str, Any], attention: str | None = None) -> Any:
    """Random weights of transformers' `kind`, in eval mode."""
    config = getattr(transformers, f"{kind}Config")(**(COMMON | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()  # type: ignore[no-untyped-call]


def make_network(kind: str, changes: dict[str, Any]) -> Network:
    return Network(make_model(kind, changes), "float32", share_prompts=True)


def make_rollouts(shapes: list[tuple[int, list[int]]]) -> Rollouts:
    """Groups of (prompt tokens, response tokens of each); the second token of a response does not count."""
    draw = np.random.default_rng(0)
    keys, prompts, responses, masks = [], [], [], []
    for group, (num_prompt, lengths) in enumerate(shapes):
        prompt = draw.integers(VOCAB, size=num_prompt)
        for sample, length in enumerate(lengths):
            keys.append([0, group, sample])
            prompts.append(prompt)
            responses.append(draw.integers(VOCAB, size=length))
            masks.append(np.arange(length) != 1)
    return Rollouts(
        keys=np.array(keys),
        prompts=prompts,
        responses=responses,
        masks=masks,
        old_logprobs=[np.zeros(mask.sum(), dtype=np.float32) for mask in masks],
        advantages=np.zeros(len(keys)),
        temperatures=np.array([[1.0, 0.7, 1.3][row % 3] for row in range(len(keys))]),
    )


SHAPES = [(5, [3, 7, 1]), (9, [6, 2]), (2, [8, 4, 5, 1])]
BEYOND = [(5, [20, 3, 31]), (19, [1, 12])]  # sequences of 8 to 36 tokens; the window is 8


def alone(model: Any, rollouts: Rollouts, row: int) -> Tensor:
    """Log-probs of one rollout by the model's own forward pass: no padding, no mask, no positions."""
    tokens = np.concatenate([rollouts.prompts[row], rollouts.responses[row]])
    logits = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits.float() / rollouts.temperatures[row], dim=-1)
    places = len(rollouts.prompts[row]) + np.flatnonzero(rollouts.masks[row])
    return logprobs[places - 1, tokens[places]]


def all_alone(model: Any, rollouts: Rollouts, batch: MicroBatch) -> Tensor:
    return torch.cat([alone(model, rollouts, row) for row in batch.rows.tolist()])


def one_batch(rollouts: Rollouts, layout: str) -> MicroBatch:
    """All rollouts: trees of whole groups, the first two in one sequence; or packed; or one a sequence."""
    if layout == "shared":
        trees = [tree_of(rollouts, group) for group in groups_of(rollouts, np.arange(len(rollouts)))]
        return build(rollouts, [trees[:2], trees[2:]] if trees[2:] else [trees], "cpu")
    trees = [tree_of(rollouts, [row]) for row in range(len(rollouts))]
    sequences = [[tree] for tree in trees] if layout == "rows" else [trees[:4], trees[4:]]
    return build(rollouts, sequences, "cpu")


def gradients(model: Any, values_N: Tensor) -> dict[str, Tensor]:
    """Of a sum in which each value has a weight of its own."""
    model.zero_grad()
    weights_N = torch.from_numpy(np.random.default_rng(1).normal(size=len(values_N))).float()
    (values_N * weights_N).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||a - b|| / ||b|| over the parameters that have a gradient."""
    assert found.keys() == expected.keys()
    # What is 0 but for rounding has no relative error: an expert without a token.
    least = 1e-6 * max(gradient.norm().item() for gradient in expected.values())
    errors: list[float] = [
        (found[name] - expected[name]).norm().item() / max(expected[name].norm().item(), least)
        for name in expected
    ]
    return max(errors)


def largest(found_N: Tensor, expected_N: Tensor) -> float:
    return float((found_N - expected_N).detach().abs().max())


# ---- where prompts are shared ----


@pytest.mark.parametrize("kind", FULL)
def test_groups_read_shared_equal_separate_sequences(kind: str) -> None:
    network, rollouts = make_network(kind, FULL[kind]), make_rollouts(SHAPES)
    assert network.layout == "shared"
    batch = one_batch(rollouts, "shared")
    assert [len(set(row.tolist()) - {-1}) for row in batch.tree_SL] == [2, 1]
    found_N, entropy_N = network.logprobs(batch, with_entropy=True)
    expected_N = all_alone(network.model, rollouts, batch)
    assert largest(found_N, expected_N) <= 5e-5
    assert entropy_N is not None
    assert entropy_N.shape == found_N.shape
    expected = gradients(network.model, expected_N)
    assert deviation(gradients(network.model, found_N), expected) <= 1e-4
    assert network.difference(rollouts, np.array([2, 0, 1])) <= 1e-5


@pytest.mark.parametrize("kind", FULL)
def test_without_prompt_sharing_rollouts_are_packed(kind: str) -> None:
    model, rollouts = make_model(kind, FULL[kind]), make_rollouts(SHAPES)
    network = Network(model, "float32", share_prompts=False)
    assert network.layout == "packed"
    batch = one_batch(rollouts, "packed")
    found_N, _ = network.logprobs(batch)
    assert largest(found_N, all_alone(model, rollouts, batch)) <= 5e-5
    network.use("rows")
    batch = one_batch(rollouts, "rows")
    found_N, _ = network.logprobs(batch)
    assert largest(found_N, all_alone(model, rollouts, batch)) <= 5e-5


def test_under_eager_attention_nothing_is_shared() -> None:
    # transformers adds a mask there: True would be 1, False 0, and everything be seen.
    model, rollouts = make_model("Qwen2", {}, attention="eager"), make_rollouts(SHAPES)
    network = Network(model, "float32", share_prompts=True)
    assert network.layout == "packed"
    batch = one_batch(rollouts, "packed")
    found_N, _ = network.logprobs(batch)
    assert largest(found_N, all_alone(model, rollouts, batch)) <= 5e-5


# ---- where sharing would be wrong without a word ----


@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_are_respected(kind: str) -> None:
    network, rollouts = make_network(kind, WINDOWED[kind]), make_rollouts(BEYOND)
    # Chunks: transformers 5.19 counts them from the start of the sequence, not of each rollout in it.
    assert network.layout in (("packed", "rows") if kind == "Llama4Text" else ("packed",))
    batch = one_batch(rollouts, network.layout)
    expected_N = all_alone(network.model, rollouts, batch)
    found_N, _ = network.logprobs(batch)
    assert largest(found_N, expected_N) <= 5e-5
    expected = gradients(network.model, expected_N)
    assert deviation(gradients(network.model, found_N), expected) <= 1e-4
    network.use("rows")
    batch = one_batch(rollouts, "rows")
    found_N, _ = network.logprobs(batch)
    assert largest(found_N, all_alone(network.model, rollouts, batch)) <= 5e-5


@pytest.mark.parametrize("kind", [kind for kind in WINDOWED if kind != "Llama4Text"])
def test_a_window_that_the_configuration_does_not_show_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(kind, WINDOWED[kind])
    network.use("shared")
    with pytest.raises(TypeError, match=r"^grpo_trees takes no sliding_window$"):
        network.difference(made_up_pair(3, 6, VOCAB), np.arange(2))
    monkeypatch.setattr("grpo.update.network.layout_of", lambda model, share_prompts: "shared")
    assert make_network(kind, WINDOWED[kind]).layout == "packed"


def test_sharing_in_spite_of_a_window_shows_only_beyond_it() -> None:
    # Only the mask knows of chunks, and under shared prompts the model makes none: nothing refuses.
    kind = "Llama4Text"
    network = make_network(kind, WINDOWED[kind])
    network.use("shared")
    # Of 9 tokens the last is predicted from 8, all of which its window of 8 holds; of 10 from 9.
    assert network.difference(made_up_pair(3, 6, VOCAB), np.arange(2)) <= 1e-5
    assert network.difference(made_up_pair(3, 7, VOCAB), np.arange(2)) > TOLERANCE
    assert network.difference(made_up_pair(5, 31, VOCAB), np.arange(2)) > 10 * TOLERANCE
    rollouts = make_rollouts(BEYOND)
    batch = one_batch(rollouts, "shared")
    found_N, _ = network.logprobs(batch)
    error = largest(found_N, all_alone(network.model, rollouts, batch))
    assert error > 10 * TOLERANCE


# ---- where one rollout goes through alone ----


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_state_is_not_handed_from_one_rollout_to_the_next(kind: str) -> None:
    network, rollouts = make_network(kind, RECURRENT[kind]), make_rollouts(BEYOND)
    assert network.layout == "rows"
    batch = one_batch(rollouts, "rows")
    assert batch.input_ids_SL.shape == (5, 36)
    expected_N = all_alone(network.model, rollouts, batch)
    found_N, _ = network.logprobs(batch)
    assert largest(found_N, expected_N) <= 5e-5
    expected = gradients(network.model, expected_N)
    assert deviation(gradients(network.model, found_N), expected) <= 1e-4


def test_a_model_without_sdpa_keeps_its_attention() -> None:
    # GPT-OSS has no sdpa, and transformers makes it no mask for packed sequences.
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default"}}
    network = make_network("GptOss", HEAD | HALF | experts | {"sliding_window": WINDOW})
    rollouts = make_rollouts(BEYOND)
    assert network.layout in ("packed", "rows")
    network.use("rows")
    batch = one_batch(rollouts, "rows")
    found_N, _ = network.logprobs(batch)
    assert largest(found_N, all_alone(network.model, rollouts, batch)) <= 5e-5


# ---- masks ----


def test_a_tree_mask_by_hand() -> None:
    # Prompt p q with responses a and b c; then prompt r with response d. In the second sequence prompt s
    # with response e, and padding, which sees padding: no row of a softmax is empty.
    rollouts = make_rollouts([(2, [1, 2]), (1, [1]), (1, [1])])
    first, second, third = (tree_of(rollouts, rows) for rows in ([0, 1], [2], [3]))
    batch = build(rollouts, [[first, second], [third]], "cpu")
    expected = [
        """
        1......
        11.....
        111....
        11.1...
        11.11..
        .....1.
        .....11
        """,
        """
        1......
        11.....
        ..1....
        ..11...
        ..111..
        ..1111.
        ..11111
        """,
    ]
    mask = tree_mask(batch)
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 1, 7, 7)
    for found, lines in zip(mask[:, 0].tolist(), expected, strict=True):
        assert ["".join("1" if sees else "." for sees in row) for row in found] == lines.split()


def test_what_a_token_and_a_position_cost() -> None:
    # Qwen2, per layer: q 32 32 + 32, k and v 2 (32 16 + 16), o 32 32, MLP 3 32 48, two norms of 32; a norm.
    layer = 1056 + 1056 + 1024 + 4608 + 64
    tied, untied = (make_model("Qwen2", {"tie_word_embeddings": tie}) for tie in (True, False))
    # Scores and their sum over values: 2 products of 32 numbers a position, in 2 layers.
    expected = Cost(2 * layer + 32, per_position=128, max_tokens=CPU_TOKENS, longest=MASKED_TOKENS)
    assert cost_of(untied, "packed") == cost_of(tied, "packed") == expected
    assert cost_of(untied, "shared") == Cost(2 * layer + 32, per_position=0, max_tokens=CPU_TOKENS)


# ---- gradient checkpointing ----


def bytes_kept(network: Network, batch: MicroBatch) -> int:
    """Size of what the forward pass keeps for the backward pass, weights aside."""
    weights = {p.data_ptr() for p in network.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs_N, _ = network.logprobs(batch)
    size = sum(kept.values())
    del logprobs_N
    return size


CHECKPOINTED: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "GPT2": dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"], 0.0),
    "Mistral": WINDOWED["Mistral"],
    "Qwen3Next": RECURRENT["Qwen3Next"],
}


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_computing_layers_again_changes_memory_alone(kind: str) -> None:
    network, rollouts = make_network(kind, CHECKPOINTED[kind]), make_rollouts(BEYOND)
    [sequences] = plan(rollouts, np.arange(5), 10**6, network.layout, network.cost)
    batch = build(rollouts, sequences, "cpu")
    expected_N, _ = network.logprobs(batch)
    expected, before = gradients(network.model, expected_N), bytes_kept(network, batch)
    network.checkpoint_gradients()
    found_N, _ = network.logprobs(batch)
    assert torch.equal(found_N, expected_N)
    assert deviation(gradients(network.model, found_N), expected) <= 1e-6
    assert bytes_kept(network, batch) < before / 2


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("Qwen2", {"attention_dropout": 0.5}, "attention_dropout 0.5"),
        ("GPT2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0}, "resid_pdrop 0.1"),
    ],
)
def test_dropout_that_checkpointing_would_switch_on_is_refused(
    kind: str, changes: dict[str, Any], found: str
) -> None:
    network, rollouts = make_network(kind, changes), make_rollouts(SHAPES)
    batch = one_batch(rollouts, "shared")
    with pytest.raises(UsageError) as caught:
        network.checkpoint_gradients()
    assert str(caught.value) == (
        f"update.gradient_checkpointing: the model has {found}, which transformers would switch on with it;"
        " set it to 0 in the checkpoint's config.json"
    )
    assert not any(module.training for module in network.model.modules())
    once_N, _ = network.logprobs(batch)
    again_N, _ = network.logprobs(batch)
    assert torch.equal(once_N, again_N)  # without it, dropout never acts


# ---- precision ----


def test_bfloat16_is_for_products_alone() -> None:
    model, rollouts = Qwen2ForCausalLM(tiny.qwen2(initializer_range=0.1)).eval(), make_rollouts(SHAPES)
    exact, rounded = (Network(model, name, share_prompts=True) for name in ("float32", "bfloat16"))
    batch = one_batch(rollouts, "shared")
    exact_N, _ = exact.logprobs(batch)
    rounded_N, _ = rounded.logprobs(batch)
    assert rounded_N.dtype == torch.float32
    assert 1e-5 < largest(rounded_N, exact_N) < 0.1
    expected, found = gradients(model, exact_N), gradients(model, rounded_N)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1e-5 < deviation(found, expected) < 0.1
    again_N, _ = rounded.logprobs(batch, exactly=True)
    assert torch.equal(again_N, exact_N)


def test_layouts_are_compared_in_the_precision_in_use_and_made_up_tokens_in_float32() -> None:
    model, rollouts = Qwen2ForCausalLM(tiny.qwen2(initializer_range=0.1)).eval(), make_rollouts(SHAPES)
    exact, rounded = (Network(model, name, share_prompts=True) for name in ("float32", "bfloat16"))
    rows = np.array([2, 0, 1])
    assert rounded.difference(rollouts, rows, exactly=True) == exact.difference(rollouts, rows) <= 1e-5
    assert 1e-5 < rounded.difference(rollouts, rows) <= ROUNDED_TOLERANCE / 4
    assert (exact.tolerance(), rounded.tolerance(exactly=True)) == (TOLERANCE, TOLERANCE)
    assert rounded.tolerance() == ROUNDED_TOLERANCE


def test_what_the_sampler_stored_in_bfloat16_is_compared_with_and_nothing_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rollouts = Qwen2ForCausalLM(tiny.qwen2(initializer_range=0.1)).eval(), make_rollouts(SHAPES)
    network, passes = Network(model, "bfloat16", share_prompts=True), []
    read, longest = network.logprobs, int(longest_pair(rollouts)[-1])

    def counted(batch: MicroBatch, **how: Any) -> Any:
        passes.append(how)
        return read(batch, **how)

    monkeypatch.setattr(network, "logprobs", counted)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rollouts.old_logprobs[longest][:] = alone(model, rollouts, longest).float().numpy()
    found = check_layouts({"policy": network}, rollouts, (5, 8), None, {})
    assert 0 < found.pop("policy_layout_difference") <= ROUNDED_TOLERANCE / 4
    assert found == {}
    assert passes.count({"exactly": False}) == 1
    rollouts.old_logprobs[longest][:] -= 2 * ROUNDED_TOLERANCE  # not what this policy gives
    check_layouts({"policy": network}, rollouts, (5, 8), None, {})
    assert passes.count({"exactly": False}) == 1 + 2
    before = len(passes)
    check_layouts({"policy": network}, rollouts, (5, 8), "shared", {})  # it was compared
    assert len(passes) == before


def test_a_wrong_layout_shows_in_bfloat16_too() -> None:
    # As in test_sharing_in_spite_of_a_window_shows_only_beyond_it.
    network = Network(make_model("Llama4Text", WINDOWED["Llama4Text"]), "bfloat16", share_prompts=True)
    network.use("shared")
    assert network.difference(made_up_pair(3, 6, VOCAB), np.arange(2)) <= ROUNDED_TOLERANCE / 3
    assert network.difference(made_up_pair(3, 12, VOCAB), np.arange(2)) > 10 * ROUNDED_TOLERANCE
    network.best = "shared"
    found = check_layouts({"policy": network}, make_rollouts(BEYOND), (5, 31), None, {})
    assert found["policy_layout_refused"] == "shared"
    assert network.layout == "rows"
