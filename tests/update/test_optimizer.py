"""AdamW with its moments in 8 bits: against a restatement, saved and gone on with, refused."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.update.examples import (
    EOS,
    OPTIMIZER_FILE,
    VOCAB,
    all_logprobs,
    as_old,
    configuration,
    in_double,
    make_learner,
    make_rollouts,
    save_learner,
    settings,
    weights_of,
    whole_step,
)
from tests.update.runs import commit_rollouts, make_run, update
from torch import Tensor
from transformers import Qwen2ForCausalLM

from grpo.config import UpdateConfig
from grpo.errors import CorruptError, InputError, UsageError
from grpo.update import stage
from grpo.update.learner import Learner
from grpo.update.objective import Stored
from grpo.update.optimizer import make_optimizer

BLOCK, SMALLEST = 256, 4096  # values; a smaller tensor stays in float32
NEAR = 1e-4  # of the largest value: how much further off than the nearest level a stored moment may be


@pytest.fixture
def library() -> None:
    pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights above SMALLEST and below."""
    folder = tmp_path_factory.mktemp("model") / "wide"
    config = tiny.qwen2(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        initializer_range=0.2,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def packed(**changes: Any) -> UpdateConfig:
    return settings(optimizer="adamw_8bit", kl_coefficient=0.0, learning_rate=0.01, **changes)


def in_full(state: dict[str, Any], moment: int) -> Tensor:
    """A moment, 1 or 2: the level that each byte stands for, times the largest value of its block."""
    value: Tensor = state[f"state{moment}"]
    if value.dtype == torch.float32:
        return value.clone()
    levels: Tensor = state[f"qmap{moment}"][value.long()].reshape(-1, BLOCK)
    found: Tensor = levels * state[f"absmax{moment}"][:, None]
    return found.reshape(value.shape)


def nearest(values: Tensor, state: dict[str, Any], moment: int) -> Tensor:
    """The same of `values` as they would be stored (arXiv 2110.02861)."""
    blocks = values.reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    levels: Tensor = state[f"qmap{moment}"]
    found = levels[(blocks / largest)[..., None].sub(levels).abs().argmin(-1)]
    return (found * largest).reshape(values.shape)


def test_its_steps_are_adamws_with_moments_rounded_after_each(library: None) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((16, SMALLEST // 16), (7, 5))]
    optimizer = make_optimizer(packed(weight_decay=0.1), parameters)
    optimizer.param_groups[0]["lr"] = 0.02
    for t in range(1, 4):
        before = [parameter.detach().clone() for parameter in parameters]
        zero = [(torch.zeros_like(value), torch.zeros_like(value)) for value in before]
        states = [optimizer.state[parameter] for parameter in parameters]
        moments = [(in_full(s, 1), in_full(s, 2)) if s else z for s, z in zip(states, zero, strict=True)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        for parameter, value, (m, v) in zip(parameters, before, moments, strict=True):
            assert parameter.grad is not None
            m, v = 0.9 * m + 0.1 * parameter.grad, 0.999 * v + 0.001 * parameter.grad**2
            moved = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            torch.testing.assert_close(
                parameter.detach(), value * (1 - 0.02 * 0.1) - 0.02 * moved, atol=2e-6, rtol=0
            )
            state = optimizer.state[parameter]
            assert (state["state1"].dtype == torch.uint8) == (parameter.numel() >= SMALLEST)
            for number, exact in ((1, m), (2, v)):
                stored, best = in_full(state, number), exact
                if parameter.numel() >= SMALLEST:
                    best = nearest(exact, state, number)
                    assert not torch.equal(best, exact)
                further = (stored - exact).abs() - (best - exact).abs()
                assert further.max() <= NEAR * exact.abs().max()


def test_stopping_and_going_on_gives_the_same_bytes(library: None, tmp_path: Path, wide: Path) -> None:
    rollouts = make_rollouts()
    rollouts = replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(wide), rollouts)))

    def step(learner: Learner) -> None:
        learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored())

    through = make_learner(wide, packed())
    step(through)
    first = save_learner(through, wide, tmp_path / "first")
    step(through)
    never = save_learner(through, wide, tmp_path / "never")
    resumed = Learner(packed(), "cpu")
    resumed.load(first / "policy", first, "a")
    again = save_learner(resumed, wide, tmp_path / "again")
    step(resumed)
    stopped = save_learner(resumed, wide, tmp_path / "stopped")

    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert content(again) == content(first)
    assert content(stopped) == content(never)
    tensors = load_file(first / OPTIMIZER_FILE)
    large = {name for name, p in weights_of(through).items() if p.numel() >= SMALLEST}
    assert 0 < len(large) < len(weights_of(through))
    assert {name.partition(".")[2] for name in tensors if name.startswith("absmax2.")} == large
    assert all(tensors[f"state1.{name}"].dtype == torch.uint8 for name in large)


def test_a_state_that_is_not_this_models_is_refused(library: None, tmp_path: Path, wide: Path) -> None:
    learner = make_learner(wide, packed())
    rollouts = make_rollouts()
    learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored())
    folder = save_learner(learner, wide, tmp_path / "saved")
    tensors = load_file(folder / OPTIMIZER_FILE)
    name = min(each for each in tensors if each.startswith("absmax1."))
    save_file({n: t for n, t in tensors.items() if n != name}, folder / OPTIMIZER_FILE)
    for config in (packed(), settings(kl_coefficient=0.0)):
        fresh = Learner(config, "cpu")
        with pytest.raises(CorruptError, match="not the optimiser state of this model: see "):
            fresh.load(folder / "policy", folder, "a")


def test_it_is_fixed_for_a_run(library: None, tmp_path: Path, untied: Path) -> None:
    config = configuration(kl_coefficient=0.0)
    run = make_run(tmp_path, config, untied, untied)
    for iteration in range(2):
        commit_rollouts(run, iteration, make_rollouts())
    update(run, 0, Learner(config.update, "cpu"))
    other = config.update.model_copy(update={"optimizer": "adamw_8bit"})
    run.config = config.model_copy(update={"update": other})
    message = "^update.optimizer: tiny has adamw, found adamw_8bit; it is fixed for a run$"
    with pytest.raises(InputError, match=message):
        update(run, 1, Learner(other, "cpu"))
    with pytest.raises(InputError, match=message):  # and before anything is sampled
        stage.check(run, 2, None)


def test_without_the_library_the_message_says_how_to_install_it(
    tmp_path: Path, untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = configuration(optimizer="adamw_8bit")
    run = make_run(tmp_path, config, untied, untied)
    with pytest.raises(UsageError) as raised:
        stage.check(run, 1, None)
    message = r"update\.optimizer: adamw_8bit: bitsandbytes cannot be imported: .*; pip install "
    assert re.fullmatch(message + r"'grpo-stages\[8bit\]'", str(raised.value))
