"""Whole runs of families whose weights or attention are laid out in a way of their own."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.conftest import Grpo
from tests.models.families import SIZES, TINY, write_checkpoint
from tests.models.test_families import plain
from transformers import AutoModelForSequenceClassification, Gemma2Config

from grpo.models import starter_model
from grpo.score.reward_model import RewardModel


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "deepseek_v3", "granitemoe", "falcon", "gpt2"])
def test_what_is_trained_is_what_transformers_loads(project: Path, grpo: Grpo, family: str) -> None:
    """Two iterations: the engine follows the weights that the learner wrote, by its own weight check."""
    start = write_checkpoint(project / "start", family, {"vocab_size": 258})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(project / "model" / name, start / name)
    sets = ["generate.engine=transformers", "model=./start", "update.learning_rate=0.001"]
    code, _, err = grpo("run", *(part for each in sets for part in ("--set", each)))
    assert code == 0, err
    policy = Path("artifacts/tiny/iteration=000001/checkpoint/policy")
    names = []
    for folder in (start, policy):
        with safe_open(folder / "model.safetensors", framework="np") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]
    trained, before = plain(policy).state_dict(), plain(start).state_dict()
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    assert grpo("verify")[0] == 0


def test_a_reward_model_with_a_softcap_is_read_in_eager_attention(tmp_path: Path) -> None:
    changes = {**SIZES, **TINY["gemma2"], "vocab_size": 258, "num_labels": 1}
    torch.manual_seed(0)
    auto: Any = AutoModelForSequenceClassification
    model = auto.from_config(Gemma2Config(**changes)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = starter_model.build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    [outcome] = RewardModel(tmp_path, "cpu").score(["1+2="], ["3 and more"], 4096)
    right, dropped = (
        auto.from_pretrained(tmp_path, attn_implementation=attention).eval()(
            torch.tensor([tokenizer("1+2=3 and more")["input_ids"]])
        )
        for attention in ("eager", "sdpa")
    )
    assert outcome.value == pytest.approx(right.logits.item(), abs=1e-5)
    assert abs(right.logits.item() - dropped.logits.item()) > 1e-2
