"""bfloat16 copies of float32 weights: what is computed with, added up, kept and gone on with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.update.examples import (
    OPTIMIZER_FILE,
    ROWS,
    all_logprobs,
    as_old,
    deviation,
    gradients,
    in_double,
    load,
    make_learner,
    make_rollouts,
    one_logprobs,
    save_learner,
    settings,
    weights_of,
    whole_step,
)
from tests.update.test_network import FULL, RECURRENT, SHAPES, WINDOWED, make_model
from tests.update.test_network import make_rollouts as rollouts_of
from torch import Tensor, nn

from grpo.config import UpdateConfig
from grpo.errors import UsageError
from grpo.update.batch import Rollouts
from grpo.update.execution import weights_digest
from grpo.update.layout import plan
from grpo.update.learner import Learner
from grpo.update.network import Network
from grpo.update.objective import Stored

REFUSED = {"Mamba"}  # its residual stream is float32, whatever its weights are
KINDS = {**FULL, **{f"{kind} with a window": changes for kind, changes in WINDOWED.items()}, **RECURRENT}


def master(**changes: Any) -> UpdateConfig:
    return settings(
        precision="bfloat16", weights="bfloat16_master", kl_coefficient=0.0, learning_rate=0.01, **changes
    )


def on_policy(checkpoint: Path) -> Rollouts:
    rollouts = make_rollouts()
    return replace(rollouts, old_logprobs=as_old(all_logprobs(in_double(checkpoint), rollouts)))


def step(learner: Learner, rollouts: Rollouts) -> dict[str, Any]:
    return learner.step(rollouts, np.arange(len(rollouts)), whole_step(rollouts), Stored())[0]


@pytest.fixture
def whole_gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Of each micro-batch the bfloat16 gradients that the hooks were given, by parameter."""
    seen: list[dict[str, Tensor]] = []
    original = nn.Parameter.register_post_accumulate_grad_hook

    def register(copy: nn.Parameter, hook: Any) -> Any:
        def spy(tensor: Tensor) -> None:
            assert tensor.grad is not None
            if not seen or id(tensor) in {int(key) for key in seen[-1]}:
                seen.append({})
            seen[-1][str(id(tensor))] = tensor.grad.clone()
            hook(tensor)

        return original(copy, spy)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(nn.Parameter, "register_post_accumulate_grad_hook", register)
    return seen


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_gradients_of_micro_batches_are_added_up_in_float32(
    model: str, request: pytest.FixtureRequest, whole_gradients: list[dict[str, Tensor]]
) -> None:
    start: Path = request.getfixturevalue(model)
    learner, rollouts = make_learner(start, master(max_tokens_per_batch=24)), on_policy(start)
    del whole_gradients[:]  # of the try at opening
    step(learner, rollouts)
    assert len(whole_gradients) >= 5
    copy = learner.network.copy
    assert copy is not None
    worst, worse = 0.0, 0.0
    for weight, own in copy._pairs:
        parts = [each[str(id(own))] for each in whole_gradients]
        assert {part.dtype for part in parts} == {torch.bfloat16}
        exact = torch.stack([part.double() for part in parts]).sum(0)
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        worst = max(worst, float((weight.grad - exact).norm() / exact.norm()))
        rounded = parts[0].clone()
        for part in parts[1:]:
            rounded += part
        worse = max(worse, float((rounded - exact).norm() / exact.norm()))
        assert own.grad is None
    # float32 rounds to 6e-8, bfloat16 to 4e-3, each time something is added.
    assert worst <= 1e-6
    assert worse >= 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_and_gradients_are_those_of_a_model_in_bfloat16(still: Path, checkpointing: bool) -> None:
    rollouts = on_policy(still)
    learner = make_learner(still, master(gradient_checkpointing=checkpointing))
    row = step(learner, rollouts)
    exact = make_learner(still, settings(kl_coefficient=0.0, learning_rate=0.01))
    expected = step(exact, rollouts)
    assert row["loss"] == pytest.approx(expected["loss"], abs=0.01)
    assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.02)
    assert 1e-4 < deviation(gradients(learner.model), gradients(exact.model)) < 0.15
    # Another policy now: read with the weights that the step left, rounded.
    plain = load(save_start(learner, still), torch.bfloat16)
    found = learner.policy_logprobs(rollouts, np.arange(ROWS))
    with torch.no_grad():
        expected_T = [one_logprobs(plain, rollouts, i).float().numpy() for i in range(ROWS)]
    # A plain forward pass rounds its logits to bfloat16 too.
    assert np.abs(np.concatenate([found[i] - expected_T[i] for i in range(ROWS)])).mean() <= 0.02


def save_start(learner: Learner, start: Path) -> Path:
    folder = start.parent / f"{start.name}-{weights_digest(learner.model)[:8]}"
    return folder / "policy" if folder.exists() else save_learner(learner, start, folder) / "policy"


def test_computing_layers_again_changes_nothing(still: Path) -> None:
    rollouts, found = on_policy(still), []
    for checkpointing in (False, True):
        learner = make_learner(still, master(gradient_checkpointing=checkpointing))
        step(learner, rollouts)
        found.append((gradients(learner.model), weights_digest(learner.model)))
    (one, digest), (other, again) = found
    assert digest == again
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_held_and_where(untied: Path) -> None:
    learner, rollouts = make_learner(untied, master()), on_policy(untied)
    step(learner, rollouts)
    copy = learner.network.copy
    assert copy is not None
    parameters = sum(p.numel() for p in learner.model.parameters())
    assert {p.dtype for p in learner.model.parameters()} == {torch.float32}
    held = {
        "weights": sum(p.nbytes for p in learner.model.parameters()),
        "gradients": sum(p.grad.nbytes for p in learner.model.parameters() if p.grad is not None),
        "moments": sum(
            value.nbytes
            for state in learner.optimizer.state.values()
            for name, value in state.items()
            if name != "step"
        ),
        "copy": sum(own.nbytes for _, own in copy._pairs),
    }
    assert held == {n: k * parameters for n, k in zip(held, (4, 4, 8, 2), strict=True)}  # 18 bytes
    with copy.in_place():
        assert {p.dtype for p in learner.model.parameters()} == {torch.bfloat16}
        assert all(p.grad is None for p in learner.model.parameters())
    learner.release()
    assert all(p.grad is None for p in learner.model.parameters())


def test_small_steps_are_not_lost(untied: Path) -> None:
    # A step of 1e-6 is below half the spacing of bfloat16 at most weights, 2e-3 of each; ten of them add up.
    learner, rollouts = make_learner(untied, master()), on_policy(untied)
    before = {name: p.clone() for name, p in weights_of(learner).items()}
    for _ in range(10):
        learner.step(rollouts, np.arange(ROWS), whole_step(rollouts), Stored(), 1e-6)
    moved = torch.cat([(p - before[name]).abs().flatten() for name, p in weights_of(learner).items()])
    assert 5e-6 < float(moved.median()) < 1.5e-5


def test_stopping_and_going_on_gives_the_same_bytes(tmp_path: Path, tied: Path) -> None:
    rollouts = on_policy(tied)
    through = make_learner(tied, master(max_tokens_per_batch=50))
    step(through, rollouts)
    first = save_learner(through, tied, tmp_path / "first")
    step(through, rollouts)
    never = save_learner(through, tied, tmp_path / "never")

    resumed = Learner(master(max_tokens_per_batch=50), "cpu")
    resumed.load(first / "policy", first, "a")
    step(resumed, rollouts)
    stopped = save_learner(resumed, tied, tmp_path / "stopped")
    through.load(first / "policy", first, "a")  # and from what is in memory
    step(through, rollouts)
    rewound = save_learner(through, tied, tmp_path / "rewound")
    for name in ("policy/model.safetensors", OPTIMIZER_FILE):
        assert (stopped / name).read_bytes() == (never / name).read_bytes() == (rewound / name).read_bytes()
        assert (first / name).read_bytes() != (never / name).read_bytes()


def test_an_optimizer_in_8_bits_steps_the_float32_weights(tmp_path: Path, untied: Path) -> None:
    pytest.importorskip("bitsandbytes")
    learner, rollouts = make_learner(untied, master(optimizer="adamw_8bit")), on_policy(untied)
    before = weights_digest(learner.model)
    step(learner, rollouts)
    assert weights_digest(learner.model) != before
    copy = learner.network.copy
    assert copy is not None
    assert all(torch.equal(own, weight.to(torch.bfloat16)) for weight, own in copy._pairs)


@pytest.mark.parametrize("name", KINDS)
def test_equal_weights_give_policy_and_reference_the_same_log_probs(name: str) -> None:
    kind, rollouts = name.split()[0], rollouts_of(SHAPES)
    for whole in (False, True):
        policy, reference = (
            Network(make_model(kind, KINDS[name]), "bfloat16", share_prompts=True) for _ in range(2)
        )
        if whole and kind in REFUSED:
            with pytest.raises(UsageError, match="mamba cannot compute with it: "):
                policy.work_in_copy()
            return
        if whole:
            policy.work_in_copy()
        size = sum(p.nbytes for p in reference.model.parameters())
        reference.model.requires_grad_(False)
        reference.narrow(whole=whole)
        narrower = sum(p.nbytes for p in reference.model.parameters())
        assert narrower == size // 2 if whole else narrower < size
        rows = np.arange(len(rollouts))
        for sequences in plan(rollouts, rows, 1000, policy.layout, policy.cost):
            batch = policy.batch(rollouts, sequences)
            with torch.no_grad():
                found = [network.logprobs(batch, with_entropy=True) for network in (policy, reference)]
            for one, other in zip(*found, strict=True):
                assert one is not None
                assert other is not None
                assert torch.equal(one, other)


def test_a_model_that_wants_float32_somewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Qwen2", {})
    network = Network(model, "bfloat16", share_prompts=True)
    norm = model.model.norm
    monkeypatch.setattr(norm, "forward", lambda hidden: hidden.float())
    message = r"^update\.weights: bfloat16_master: qwen2 cannot compute with it: .*; set weights: float32$"
    with pytest.raises(UsageError, match=message):
        network.work_in_copy()
