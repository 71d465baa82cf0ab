"""What is read a weight at a time, into a model without any, is what load_model() gives."""

import copy
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.families import write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo.errors import CorruptError
from grpo.models.families import FAMILIES
from grpo.models.loading import load_model
from grpo.models.slices import slices_of
from grpo.models.weights import published_state

HALF = "model.layers.1.mlp.down_proj.weight"


def tensors_of(model: Any) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def filled(checkpoint: Path) -> Any:
    """The model of a checkpoint, whole; read as a process does that keeps all of each weight."""
    slices = slices_of(checkpoint, "auto")
    assert slices is not None
    model = copy.deepcopy(slices.model)
    assert all(weight.is_meta for weight in model.parameters())
    model.to_empty(device="cpu").tie_weights()
    slices.fill(model, lambda target, source: target.copy_(source[...]))
    return model


def stored_anew(checkpoint: Path, dtype: torch.dtype, size: str) -> None:
    """In files of `size` at most, in `dtype`."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size=size)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_one_that_load_model_gives(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path, family)
    if FAMILIES.index(family) % 2:
        stored_anew(tmp_path, torch.bfloat16, "20KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
    model, right = filled(tmp_path), load_model(tmp_path, "cpu")
    found, expected = tensors_of(model), tensors_of(right)
    assert [*found] == [*expected]  # tied ones once
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert [*published_state(model)] == [*published_state(right)]
    assert model.config.to_dict() == right.config.to_dict()
    assert not model.training


def test_files_in_a_form_that_transformers_does_not_write_are_not_read_so(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "qwen3") / "model.safetensors"
    assert slices_of(tmp_path, "auto") is not None
    weights = load_file(path)
    # Of a tied pair both: load_model() takes that too.
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    assert slices_of(tmp_path, "auto") is None
    # The name of the trunk alone, which transformers completes.
    save_file({name.removeprefix("model."): weight for name, weight in weights.items()}, path)
    assert slices_of(tmp_path, "auto") is None
    load_model(tmp_path, "cpu")
    save_file(weights | {HALF: weights[HALF].T.contiguous()}, path)
    assert slices_of(tmp_path, "auto") is None


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_weight_that_is_not_finite_is_said_as_load_model_says_it(tmp_path: Path, family: str) -> None:
    path = write_checkpoint(tmp_path, family) / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name][-1, -1] = torch.nan
    save_file(weights, path)
    with pytest.raises(CorruptError) as right:
        load_model(tmp_path, "cpu")
    with pytest.raises(CorruptError) as found:
        filled(tmp_path)
    assert str(found.value) == str(right.value)
    assert str(found.value).endswith("holds NaN or infinity; every weight must be finite")


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama") / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {HALF: weights[HALF].to(torch.int32)}, path)
    with pytest.raises(CorruptError, match=f"weight {HALF} is stored as I32; real numbers are right"):
        slices_of(tmp_path, "auto")


def test_a_configuration_that_asks_for_too_much_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 2**40}))
    with pytest.raises(CorruptError, match=r"config\.json asks for far more weights"):
        slices_of(tmp_path, "auto")
