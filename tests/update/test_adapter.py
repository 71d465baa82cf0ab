"""The adapter on tiny real models: what trains, what is merged, what is saved."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3MoeConfig

from grpo.config import LoraConfig
from grpo.errors import CorruptError, InputError, UsageError
from grpo.models import weights as in_memory
from grpo.models.loading import load_model
from grpo.update import adapter as room
from grpo.update.adapter import (
    adapter_files,
    add_adapter,
    load_adapter,
    reset_adapter,
)

RANK, ALPHA, SEED = 4, 8, 3
IDS = torch.tensor([[5, 80, 3, 200, 256, 7], [1, 2, 3, 4, 5, 6]])
QWEN2 = tiny.qwen2(tie_word_embeddings=False)
CONFIGS: dict[str, Any] = {
    "untied": QWEN2,
    "tied": tiny.qwen2(tie_word_embeddings=True),
    "gpt2": GPT2Config(  # its linear modules are Conv1D, their weights [in, out]; tied
        vocab_size=tiny.BYTES,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=256,
    ),
}
# 2 layers of q, k, v, o, gate, up, down; of attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
NUM_TARGETS = {"untied": 14, "tied": 14, "gpt2": 8}


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig.model_validate({"rank": RANK, "alpha": float(ALPHA), **changes})


def make(config: Any = QWEN2) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.eval()


def adapted(config: Any = QWEN2, seed: int = SEED, targets: list[str] | None = None) -> PeftModel:
    return add_adapter(make(config), lora(targets=targets), seed)


def plain_state(model: PeftModel) -> dict[str, Tensor]:
    return in_memory.plain_state(base_of(model))


def merged(model: PeftModel, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return in_memory.merged(base_of(model), state)


def holds_adapted(model: PeftModel, state: dict[str, Tensor]) -> bool:
    return in_memory.holds_adapted(base_of(model), state)


def base_of(model: PeftModel) -> Any:
    return model.get_base_model()


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def bits(model: PeftModel) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in plain_state(model).items()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def loss_of(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits.log_softmax(-1).square().mean()
    return found


def optimizer_of(model: PeftModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained(model).values(), lr=0.01)


def train(model: PeftModel, optimizer: torch.optim.AdamW, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def trained_model(config: Any = QWEN2) -> PeftModel:
    model = adapted(config)
    train(model, optimizer_of(model))
    return model


def save(model: PeftModel, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in adapter_files(model):
        (folder / name).write_bytes(content)
    return folder


# ---- what is added ----


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_adapter_trains_and_at_first_it_changes_nothing(name: str) -> None:
    plain = logits(make(CONFIGS[name]))
    model = adapted(CONFIGS[name])
    assert torch.equal(logits(model), plain)
    assert len(trained(model)) == 2 * NUM_TARGETS[name]
    assert all(re.search(r"\.lora_[AB]\.default\.weight$", parameter) for parameter in trained(model))
    assert not any(module.training for module in model.modules())

    loss_of(model).backward()  # type: ignore[no-untyped-call]
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model).keys()
    # d loss / d A = B' ... = 0 while B = 0; d loss / d B is not
    assert all(
        bool(p.grad.any()) == (".lora_B." in n) for n, p in trained(model).items() if p.grad is not None
    )


def test_the_first_weights_are_a_function_of_the_seed_alone() -> None:
    first = trained(adapted())
    torch.manual_seed(77)
    before = torch.get_rng_state()
    again = adapted()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == trained(again).keys()
    assert all(torch.equal(first[name], p) for name, p in trained(again).items())
    other = trained(adapted(seed=SEED + 1))
    for name, p in first.items():
        assert torch.equal(p, other[name]) == (".lora_B." in name)
        if ".lora_B." in name:
            assert not p.any()
        else:  # uniform in +-1 / sqrt(in), as the weight of a linear layer
            assert 0.9 < p.abs().max().item() * p.shape[1] ** 0.5 <= 1
    assert len({p.flatten()[0].item() for name, p in first.items() if ".lora_A." in name}) == 14

    train(again, optimizer_of(again))
    reset_adapter(base_of(again), SEED)
    assert all(torch.equal(first[name], p) for name, p in trained(again).items())


def test_targets_are_last_parts_of_names() -> None:
    modules = {name.rpartition(".lora_")[0] for name in trained(adapted(targets=["v_proj", "1.mlp.up_proj"]))}
    assert modules == {
        "base_model.model.model.layers.0.self_attn.v_proj",
        "base_model.model.model.layers.1.self_attn.v_proj",
        "base_model.model.model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize("target", ["q", "lm_head", "embed_tokens", "layers"])
@pytest.mark.parametrize("config", ["untied", "tied"])
def test_a_target_that_takes_no_adapter_is_refused(target: str, config: str) -> None:
    message = (
        f"update.lora.targets: '{target}' is not a linear module that can take an adapter; of this model"
        " these can: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        adapted(CONFIGS[config], targets=["q_proj", target])


def test_a_weight_that_two_modules_share_is_refused() -> None:
    model: Any = make()
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    message = (
        "update.lora.targets: model.layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight are one"
        " weight, which cannot take an adapter; name other targets"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        add_adapter(model, lora(), SEED)
    assert len(trained(add_adapter(model, lora(targets=["down_proj"]), SEED))) == 4


def test_without_peft_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    message = r"^update\.lora: peft cannot be imported: .*; pip install 'grpo-stages\[lora\]'$"
    with pytest.raises(UsageError, match=message) as caught:
        adapted()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dense", [[], [0]])
def test_fused_experts_take_no_adapter(dense: list[int]) -> None:
    values = QWEN2.to_diff_dict() | {"model_type": "qwen3_moe", "mlp_only_layers": dense}
    config = Qwen3MoeConfig(
        **values | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    )
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert len(trained(adapted(config, targets=attention))) == 2 * 2 * 4
    if not dense:
        assert len(trained(adapted(config))) == 2 * 2 * 4
        return
    message = (
        "update.lora.targets: peft would adapt the fused experts in place of model.layers.0.mlp.down_proj;"
        " name only modules that no expert has, such as q_proj"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        adapted(config)


# ---- the adapter off ----


@pytest.mark.parametrize("inference", [False, True])
def test_with_the_adapter_off_the_base_is_the_base(inference: bool) -> None:
    plain = logits(make())
    model = trained_model()
    on, before = logits(model), {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.inference_mode(inference), model.disable_adapter():
        assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model.get_base_model()), plain)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model), on)
    assert not torch.equal(on, plain)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(module.training for module in model.modules())
    train(model, optimizer_of(model))  # weights that were made inference tensors would refuse


def test_the_base_computes_with_the_adapter_however_it_is_called() -> None:
    model = trained_model()
    base: Any = model.get_base_model()
    assert torch.equal(logits(base), logits(model))
    with torch.no_grad():
        assert torch.equal(base.lm_head(base.model(input_ids=IDS).last_hidden_state), logits(model))


@pytest.mark.parametrize("inner", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(inner: bool) -> None:
    model = trained_model()
    expected = torch.autograd.grad(loss_of(model), list(trained(model).values()))
    base: Any = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.train()  # transformers checkpoints in train mode only
    found = torch.autograd.grad(loss_of(base if inner else model), list(trained(model).values()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- merging ----


@pytest.mark.parametrize("name", CONFIGS)
def test_the_merged_checkpoint_is_the_adapted_model(tmp_path: Path, name: str) -> None:
    start = make(CONFIGS[name])
    names = {n for n, _ in start.named_parameters()} | {n for n, _ in start.named_buffers()}
    start.save_pretrained(tmp_path)
    model = trained_model(CONFIGS[name])
    state = dict(merged(model, plain_state(model)))
    assert state.keys() == names & start.state_dict().keys()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_model(tmp_path, "cpu")
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=0)
    assert (logits(found) - logits(start)).abs().max() > 0.01


def test_a_merged_weight_by_hand() -> None:
    model = adapted(targets=["0.self_attn.k_proj"])
    weight_A, weight_B = trained(model).values()
    with torch.no_grad():
        weight_A.zero_()[1, 5] = 3.0
        weight_B.zero_()[2, 1] = 0.25
    base = plain_state(model)
    state = dict(merged(model, {"any name": base["model.layers.0.self_attn.k_proj.weight"]} | base))
    # alpha / rank B A = 8 / 4 x 0.25 x 3 = 1.5 in row 2 of B and column 5 of A, 0 elsewhere
    difference = (
        state["model.layers.0.self_attn.k_proj.weight"] - base["model.layers.0.self_attn.k_proj.weight"]
    )
    assert difference[2, 5].item() == pytest.approx(1.5, abs=1e-6)
    difference[2, 5] = 0
    assert not difference.any()
    assert torch.equal(state["any name"], state["model.layers.0.self_attn.k_proj.weight"])
    assert state["model.norm.weight"].data_ptr() == base["model.norm.weight"].data_ptr()


def test_training_and_merging_leave_the_bits_of_the_base() -> None:
    plain = {name: tensor.numpy().tobytes() for name, tensor in make().state_dict().items()}
    model = adapted()
    optimizer = optimizer_of(model)
    for _ in range(50):
        train(model, optimizer, steps=1)
        state = dict(merged(model, plain_state(model)))
        assert not state["model.layers.0.mlp.up_proj.weight"].requires_grad
        with model.disable_adapter():
            logits(model)
    assert bits(model) == plain


def test_a_state_in_which_an_adapted_weight_was_converted_does_not_hold_it() -> None:
    model = adapted()
    state = plain_state(model)
    assert holds_adapted(model, {f"renamed.{name}": tensor for name, tensor in state.items()})
    halves = dict(zip(("a", "b"), state.pop("model.layers.0.mlp.up_proj.weight").chunk(2), strict=True))
    assert not holds_adapted(model, state | halves)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    plain, model = make().state_dict(), add_adapter(make(), lora(rslora=True), SEED)
    train(model, optimizer_of(model))
    name = "model.layers.1.self_attn.q_proj"
    weights = trained(model)
    weight_A, weight_B = (weights[f"base_model.model.{name}.lora_{each}.default.weight"] for each in "AB")
    found = dict(merged(model, plain_state(model)))[f"{name}.weight"]
    # alpha / sqrt(rank) = 8 / 2
    torch.testing.assert_close(found, plain[f"{name}.weight"] + 4 * weight_B @ weight_A, atol=1e-6, rtol=0)


# ---- what trains whole ----

WHOLE = {
    "untied": ["lm_head"],
    "tied": ["lm_head", "embed_tokens"],  # one weight
    "gpt2": ["ln_f", "h.0.attn"],  # in the latter are targets, which then are none
}


def with_whole(name: str) -> PeftModel:
    return add_adapter(make(CONFIGS[name]), lora(modules_to_save=WHOLE[name]), SEED)


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_train_whole_beside_the_adapter(tmp_path: Path, name: str) -> None:
    start, model = make(CONFIGS[name]), with_whole(name)
    assert torch.equal(logits(model), logits(start))
    train(model, optimizer_of(model))
    changed = {
        n for n, tensor in plain_state(model).items() if not torch.equal(tensor, start.state_dict()[n])
    }
    expected = {n for n in start.state_dict() if any(f".{each}." in f".{n}" for each in WHOLE[name])} - {
        "transformer.h.0.attn.bias"
    }
    if "lm_head" in WHOLE[name] and start.config.tie_word_embeddings:
        expected.remove("lm_head.weight")  # plain_state has a tied weight once
    assert changed == expected
    assert not any("h.0.attn." in n for n in trained(model) if ".lora_" in n)

    # The checkpoint, and the adapter on the model it began from, are the model that trained.
    start.save_pretrained(tmp_path / "merged")
    state = dict(merged(model, plain_state(model)))
    tied = {"lm_head.weight"} if start.config.tie_word_embeddings else set()
    kept = {n: tensor.contiguous() for n, tensor in state.items() if n not in tied}
    save_file(kept, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    found = load_model(tmp_path / "merged", "cpu")
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=0)
    loaded = PeftModel.from_pretrained(make(CONFIGS[name]), save(model, tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded.eval()), logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_that_train_whole_go_on_with_the_same_bits(tmp_path: Path, name: str) -> None:
    model, resumed = with_whole(name), with_whole(name)
    train(model, optimizer_of(model))
    load_adapter(resumed, save(model, tmp_path / "adapter"))
    assert bits(resumed) == bits(model)
    assert dict(adapter_files(resumed)) == dict(adapter_files(model))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            "untied",
            {"modules_to_save": ["head"]},
            "'head' names no module with weights; of this model",
        ),
        ("untied", {"modules_to_save": ["rotary_emb"]}, "'rotary_emb' names no module with weights"),
        (
            "tied",
            {"modules_to_save": ["lm_head"]},
            "model.embed_tokens has a weight of lm_head too, which would change there; name"
            " model.embed_tokens as well",
        ),
        ("tied", {"modules_to_save": ["embed_tokens"]}, "lm_head has a weight of model.embed_tokens too"),
    ],
)
def test_a_module_that_cannot_train_whole_is_refused(
    config: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(f"update.lora.modules_to_save: {message}")):
        add_adapter(make(CONFIGS[config]), lora(**changes), SEED)


def test_a_target_in_a_module_that_trains_whole_is_refused() -> None:
    changes = {"modules_to_save": ["1.mlp"], "targets": ["1.mlp.up_proj"]}
    message = "update.lora.targets: '1.mlp.up_proj' is not a linear module that can take an adapter"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        add_adapter(make(), lora(**changes), SEED)
    message = "update.lora.targets: nothing is targeted; of this model these can be: none"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        add_adapter(make(), lora(modules_to_save=["layers"]), SEED)


# ---- files ----


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_the_files(tmp_path: Path, name: str) -> None:
    model = trained_model(CONFIGS[name])
    folder = save(model, tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(make(CONFIGS[name]), folder)
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert torch.equal(logits(loaded.merge_and_unload()), logits_of_merged(model, CONFIGS[name]))


def logits_of_merged(model: PeftModel, config: Any) -> Tensor:
    plain = make(config)
    plain.load_state_dict(dict(merged(model, plain_state(model))), strict=False)
    return logits(plain)


def test_the_files_are_the_same_everywhere(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "base")
    script = (
        "import sys; from pathlib import Path; from grpo.models.loading import load_model;"
        "from grpo.config import LoraConfig;"
        "from grpo.update.adapter import add_adapter, adapter_files;"
        "model = add_adapter(load_model(Path(sys.argv[1]), 'cpu'), LoraConfig(rank=4, alpha=8.0), 3);"
        "[(Path(sys.argv[2]) / name).write_bytes(content) for name, content in adapter_files(model)]"
    )
    folder = tmp_path / "adapter"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "base"), str(folder)],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""  # no warnings
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    files = dict(adapter_files(add_adapter(load_model(moved, "cpu"), lora(), SEED)))
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}

    document = json.loads(files["adapter_config.json"])
    assert document["peft_type"] == "LORA"
    assert (document["r"], document["lora_alpha"], document["lora_dropout"]) == (RANK, ALPHA, 0.0)
    assert (document["bias"], document["base_model_name_or_path"]) == ("none", None)
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_loading_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    through = adapted()
    optimizer = optimizer_of(through)
    train(through, optimizer)
    folder = save(through, tmp_path / "adapter")
    moments = [
        {name: tensor.clone() for name, tensor in optimizer.state[p].items()}
        for p in trained(through).values()
    ]
    train(through, optimizer)

    resumed = adapted(seed=SEED + 1)
    addresses = [p.data_ptr() for p in trained(resumed).values()]
    load_adapter(resumed, folder)
    assert [p.data_ptr() for p in trained(resumed).values()] == addresses
    assert dict(adapter_files(resumed)) == {path.name: path.read_bytes() for path in folder.iterdir()}
    optimizer = optimizer_of(resumed)
    for p, state in zip(trained(resumed).values(), moments, strict=True):
        optimizer.state[p] = state
    train(resumed, optimizer)
    assert dict(adapter_files(resumed)) == dict(adapter_files(through))
    assert bits(resumed) == bits(through)


def test_an_adapter_with_other_settings_is_refused(tmp_path: Path) -> None:
    folder = save(adapted(), tmp_path / "adapter")
    for model, message in [
        (
            add_adapter(make(), lora(alpha=16.0), SEED),
            "lora_alpha is 8.0; update.lora asks for 16.0; they are",
        ),
        (
            add_adapter(make(), lora(rank=2), SEED),
            "r is 4; update.lora asks for 2; they are fixed for a run",
        ),
        (adapted(targets=["q_proj"]), r"target_modules is \[.*; update.lora asks for \["),
        (add_adapter(make(), lora(rslora=True), SEED), "use_rslora is False; update.lora asks for True"),
        (
            add_adapter(make(), lora(modules_to_save=["lm_head"]), SEED),
            r"modules_to_save is None; update.lora asks for \['lm_head'\]",
        ),
    ]:
        before = dict(adapter_files(model))
        with pytest.raises(InputError, match=f"^{re.escape(str(folder))}/adapter_config.json: {message}"):
            load_adapter(model, folder)
        assert dict(adapter_files(model)) == before


def test_weights_that_are_not_the_adapters_are_refused(tmp_path: Path) -> None:
    model = adapted()
    folder = save(trained_model(), tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    before, tensors = dict(adapter_files(model)), load_file(path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    for changed, message in [
        ({n: t for n, t in tensors.items() if n != name}, f"not the weights of this adapter: see {name}"),
        (tensors | {"base.weight": torch.zeros(1)}, "not the weights of this adapter: see base.weight"),
        (tensors | {name: torch.zeros(47, 4)}, rf"{name} is torch.float32 of the shape \[47, 4\]"),
        (tensors | {name: tensors[name].half()}, rf"{name} is torch.float16 of the shape \[48, 4\]"),
    ]:
        save_file(changed, path)
        with pytest.raises(CorruptError, match=f"^{re.escape(str(path))}: {message}$"):
            load_adapter(model, folder)
        assert dict(adapter_files(model)) == before


def test_only_this_room_knows_peft() -> None:
    package = Path(room.__file__).parents[1]
    assert [path for path in package.rglob("*.py") if imports_peft(path)] == [Path(room.__file__)]


def imports_peft(path: Path) -> bool:
    """Whether a file imports peft when it is run; what is for type checkers never is."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return any(" peft" in ast.unparse(node) for node in imports)
