"""Checkpoints: byte for byte those of the safetensors library, and of Hugging Face to load."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tests.update.examples import (
    load,
    make_learner,
    make_rollouts,
    save_learner,
    settings,
    whole_step,
)
from transformers import AutoModelForCausalLM

from grpo.errors import CorruptError
from grpo.update.checkpoint import safetensors_file
from grpo.update.learner import Learner
from grpo.update.objective import Stored


def test_a_file_in_pieces_is_that_of_the_library() -> None:
    draw = torch.Generator().manual_seed(0)
    types = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    tensors = {
        f"{name}.{number}": (torch.randn(shape, generator=draw) * 4).to(dtype)
        for number, dtype in enumerate(types)
        for name, shape in (("b", (3, 5)), ("a.weight", (7,)), ("one", ()), ("none", (0, 2)))
    }
    assert b"".join(safetensors_file(tensors)) == save(tensors, metadata={"format": "pt"})
    transposed = {"weight": torch.randn(4, 6, generator=draw).T}
    plain = {"weight": transposed["weight"].contiguous()}
    assert b"".join(safetensors_file(transposed)) == save(plain, metadata={"format": "pt"})
    assert b"".join(safetensors_file({})) == save({}, metadata={"format": "pt"})


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_a_checkpoint_is_one_of_hugging_face(
    tmp_path: Path, model: str, request: pytest.FixtureRequest
) -> None:
    start = request.getfixturevalue(model)
    learner = make_learner(start, settings("grpo_sequence", kl_coefficient=0.0, learning_rate=0.01))
    rollouts = make_rollouts()
    learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored())
    folder = save_learner(learner, start, tmp_path / "saved") / "policy"
    pair: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    loaded, report = pair
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.float32
    expected = learner.model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    embedding = loaded.get_input_embeddings().weight
    assert (embedding.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()) == (model == "tied")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, learner.model(ids).logits)
    before = load(start, torch.float32)
    assert not torch.equal(before.get_input_embeddings().weight, embedding)
    assert json.loads((folder / "config.json").read_text()) == json.loads((start / "config.json").read_text())


def test_optimiser_state_of_another_model_is_refused(tmp_path: Path, tied: Path, untied: Path) -> None:
    learner = make_learner(untied, settings(kl_coefficient=0.0))
    rollouts = make_rollouts()
    learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored())
    folder = save_learner(learner, untied, tmp_path / "saved")
    fresh = Learner(settings(), "cpu")
    with pytest.raises(
        CorruptError, match=r"not the optimiser state of this model: see exp_avg\.lm_head\.weight"
    ):
        fresh.load(tied, folder, "a")
    assert fresh.holds is None
