import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Gemma3Config,
    GPT2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo.errors import CorruptError, GrpoError, InputError
from grpo.models.loading import (
    Blueprint,
    context_length,
    copy_weights,
    eos_token_ids,
    load_model,
    load_tokenizer,
)

Change = Callable[[Path], Any]


def config(**changes: Any) -> Qwen2Config:
    values = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "eos_token_id": 3,
    }
    return Qwen2Config(**(values | changes))


def write_checkpoint(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    torch.manual_seed(seed)
    model: Any = Qwen2ForCausalLM(config(**changes))
    model.to(dtype).save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "policy")


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def apply(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    return apply


def change_config(**changes: Any) -> Change:
    def apply(path: Path) -> None:
        document = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(document | changes))

    return apply


def test_load_gives_aligned_float32_copies_in_eval_mode(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = load_file(checkpoint / "model.safetensors")
    capfd.readouterr()
    model = load_model(checkpoint, "cpu")
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.data_ptr() % 64 == 0
        assert torch.equal(parameter, saved[name])
    # A file that changes afterwards does not change the model.
    change_weights(lambda weights: [tensor.zero_() for tensor in weights.values()])(checkpoint)
    assert torch.equal(model.get_parameter("model.norm.weight"), saved["model.norm.weight"])


def test_bfloat16_weights_are_cast_to_float32(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "policy", dtype=torch.bfloat16)
    weight = load_model(path, "cpu").get_parameter("model.embed_tokens.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, load_file(path / "model.safetensors")["model.embed_tokens.weight"].float())


def test_tied_embeddings_stay_tied(checkpoint: Path, tmp_path: Path) -> None:
    model: Any = load_model(checkpoint, "cpu")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    copy_weights(model, write_checkpoint(tmp_path / "other", seed=1))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_copied_weights_compute_the_same_bits_as_loaded_ones(checkpoint: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    model = load_model(checkpoint, "cpu")
    tokens_BT = torch.tensor([[5, 6, 7, 8, 9]])
    before = model(tokens_BT).logits
    copy_weights(model, other)
    assert torch.equal(model(tokens_BT).logits, load_model(other, "cpu")(tokens_BT).logits)
    assert not torch.equal(model(tokens_BT).logits, before)


def test_a_blueprint_gives_what_loading_does_and_nothing_of_what_was_computed(
    checkpoint: Path, tmp_path: Path
) -> None:
    first = load_model(checkpoint, "cpu")
    blueprint = Blueprint(first, checkpoint)
    with torch.no_grad():
        for tensor in (*first.parameters(), *first.buffers()):
            tensor.fill_(0.25)  # as training, and some rotary embeddings, write into them
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, other / "model.safetensors")
    for path in (checkpoint, other, checkpoint):
        found, right = blueprint.load_model(path, "cpu"), load_model(path, "cpu")
        assert found is not None
        for named in ("named_parameters", "named_buffers"):
            pairs = zip(getattr(found, named)(), getattr(right, named)(), strict=True)
            assert all(one == two and torch.equal(a, b) for (one, a), (two, b) in pairs)
        assert all(weight.data_ptr() % 64 == 0 for weight in found.parameters())
        assert not found.training
        assert len(found.state_dict()) == len(right.state_dict())  # what is tied stays tied
        with torch.no_grad():
            next(found.parameters()).fill_(1.0)


@pytest.mark.parametrize("change", ["config", "dtype", "names", "no weights", "cut"])
def test_a_blueprint_leaves_other_checkpoints_to_loading(
    checkpoint: Path, tmp_path: Path, change: str
) -> None:
    blueprint = Blueprint(load_model(checkpoint, "cpu"), checkpoint)
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    path = other / "model.safetensors"
    weights = load_file(path)
    if change == "config":
        document = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**document, "rope_theta": 5.0}))
    elif change == "dtype":
        save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, path)
    elif change == "names":
        save_file({f"x{name}": tensor for name, tensor in weights.items()}, path)
    elif change == "no weights":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    assert blueprint.load_model(other, "cpu") is None


def test_a_blueprint_refuses_weights_that_are_not_finite(checkpoint: Path, tmp_path: Path) -> None:
    blueprint = Blueprint(load_model(checkpoint, "cpu"), checkpoint)
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = load_file(other / "model.safetensors")
    name = min(weights)
    weights[name][0] = float("nan")
    save_file(weights, other / "model.safetensors")
    with pytest.raises(CorruptError, match=f"weight {name} holds NaN or infinity"):
        blueprint.load_model(other, "cpu")


def test_copy_refuses_another_architecture(checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint, "cpu")
    other = write_checkpoint(tmp_path / "other", intermediate_size=32)
    before = model.get_parameter("model.norm.weight").clone()
    with pytest.raises(InputError, match=r"other: weight model\.layers\.0\.mlp\.down_proj\.weight differs"):
        copy_weights(model, other)
    assert torch.equal(model.get_parameter("model.norm.weight"), before)


FAULTS: list[tuple[Change, type[GrpoError], str]] = [
    (shutil.rmtree, InputError, "policy: no such directory; a Hugging Face checkpoint directory is needed"),
    (lambda p: (p / "config.json").unlink(), InputError, "policy: has no config.json"),
    (lambda p: (p / "model.safetensors").unlink(), InputError, "policy: has no model.safetensors or"),
    (lambda p: (p / "config.json").write_text("{"), CorruptError, "config.json: is not JSON: Expecting"),
    (
        lambda p: (p / "config.json").write_text("[]"),
        CorruptError,
        "config.json: expected a JSON object, found list",
    ),
    (
        lambda p: (p / "model.safetensors").write_bytes(b"x"),
        CorruptError,
        "its weights cannot be read: Error",
    ),
    (
        change_weights(lambda weights: weights.pop("model.norm.weight")),
        CorruptError,
        "missing weight model.norm.weight; the weights must be exactly those of config.json",
    ),
    (
        change_weights(lambda weights: weights.update(a=torch.zeros(2), b=torch.zeros(2))),
        CorruptError,
        "unexpected weight a and 1 more; the weights must be exactly",
    ),
    (
        change_weights(lambda weights: weights.update({"model.norm.weight": torch.zeros(2)})),
        CorruptError,
        "weight model.norm.weight has shape [2]; config.json asks for [16]",
    ),
    (
        change_weights(lambda weights: weights["model.norm.weight"][3].fill_(torch.nan)),
        CorruptError,
        "weight model.norm.weight holds NaN or infinity; every weight must be finite",
    ),
    (
        change_weights(lambda weights: weights["model.norm.weight"][3].fill_(-torch.inf)),
        CorruptError,
        "weight model.norm.weight holds NaN or infinity",
    ),
    (change_config(model_type="nope"), InputError, "model type `nope`"),
    (change_config(num_hidden_layers=3), InputError, "`num_hidden_layers` (3) must be equal"),
    (change_config(model_type="t5"), InputError, "Unrecognized configuration class"),
]


@pytest.mark.parametrize(
    ("fault", "error", "message"), FAULTS, ids=[message[:40] for _, _, message in FAULTS]
)
def test_a_faulty_checkpoint_gets_one_line(
    checkpoint: Path, fault: Change, error: type[GrpoError], message: str
) -> None:
    fault(checkpoint)
    with pytest.raises(error) as caught:
        load_model(checkpoint, "cpu")
    assert message in str(caught.value)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


def write_tokenizer(path: Path, eos_token: str) -> None:
    words = {word: index for index, word in enumerate(["a", "b", "<end>", "<stop>"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="a"))
    fast_class: Any = PreTrainedTokenizerFast
    fast_class(tokenizer_object=tokenizer, eos_token=eos_token).save_pretrained(path)


def test_tokenizer(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"policy: has no tokenizer\.json or .*; a tokenizer cannot"):
        load_tokenizer(checkpoint)
    write_tokenizer(checkpoint, "<end>")
    assert load_tokenizer(checkpoint).convert_tokens_to_ids(["b", "<end>"]) == [1, 2]
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="policy: its tokenizer cannot be loaded: "):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize(
    ("generation", "model", "tokenizer", "expected"),
    [
        ([7, 9], 3, "<end>", {7, 9}),  # generation_config.json decides alone
        (0, 3, None, {0}),
        (None, 3, "<end>", {3, 2}),
        (None, [3, 4], None, {3, 4}),
        (None, None, "<stop>", {3}),
        (None, None, None, set()),
    ],
)
def test_eos_token_ids(
    checkpoint: Path, generation: Any, model: Any, tokenizer: str | None, expected: set[int]
) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "top_k": 5}))
    change_config(eos_token_id=model)(checkpoint)
    if tokenizer is not None:
        write_tokenizer(checkpoint, tokenizer)
    assert eos_token_ids(checkpoint) == expected


def test_eos_token_ids_without_a_generation_config(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    assert eos_token_ids(checkpoint) == {3}


def test_context_length() -> None:
    assert context_length(config()) == 64
    assert context_length(GPT2Config(n_positions=32)) == 32
    assert context_length(Gemma3Config(text_config={"max_position_embeddings": 96})) == 96
