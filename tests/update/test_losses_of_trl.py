"""TRL's own loss on the same rollouts: `GRPOTrainer._compute_loss`, given these log-probs and entropies.

In float64, in TRL's evaluation mode: there its loss is of one batch, without its factors for accumulation.
What differs by intent is in docs/math.md.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import restatement
from tests.restatement import Response
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from grpo.update.given import Given, Objective, Step
from grpo.update.objective import batch_loss

LENGTHS, WIDTH = torch.tensor([5, 1, 8, 3, 6, 2]), 8
ADVANTAGES = torch.tensor([0.9, -1.3, -0.4, 1.7, -0.8, 0.0], dtype=torch.float64)
# The caps of TRL's cispo are ratios, ours a distance from 1.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": ({"loss_type": "grpo"}, {}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"clip_high": 0.28, "aggregate": "token_mean"}),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"ratio": "sequence_mean"}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {"surrogate": "cispo", "clip_low": None, "clip_high": 0.3, "aggregate": "token_mean"},
    ),
    "sapo": ({"loss_type": "sapo"}, {"surrogate": "sapo", "clip_low": None, "clip_high": None}),
    "sapo, other temperatures": (
        {"loss_type": "sapo", "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0},
        {
            "surrogate": "sapo",
            "tau_positive": 0.5,
            "tau_negative": 3.0,
            "clip_low": None,
            "clip_high": None,
        },
    ),
    "vespo": (
        {"loss_type": "vespo"},
        {"surrogate": "vespo", "clip_low": None, "clip_high": None, "aggregate": "token_mean"},
    ),
    "off-policy mask": ({"loss_type": "grpo", "off_policy_mask_threshold": 0.1}, {"off_policy_mask": 0.1}),
    "off-policy mask of gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.1},
        {"ratio": "sequence_mean", "off_policy_mask": 0.1},
    ),
    "top entropy": ({"loss_type": "grpo", "top_entropy_quantile": 0.3}, {"top_entropy": 0.3}),
    "both masks": (
        {"loss_type": "dapo", "top_entropy_quantile": 0.6, "off_policy_mask_threshold": 0.1},
        {"aggregate": "token_mean", "top_entropy": 0.6, "off_policy_mask": 0.1},
    ),
}


class _OneProcess:
    """An accelerator of one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, values: Tensor) -> Tensor:
        return values

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values

    def pad_across_processes(self, values: Tensor, dim: int, pad_index: float) -> Tensor:
        return values


def trl_loss(keys: dict[str, Any], rollouts: dict[str, Tensor], tmp_path: Any) -> Tensor:
    args = GRPOConfig(output_dir=str(tmp_path), report_to=[], bf16=False, use_cpu=True, **keys)
    trainer = SimpleNamespace(
        args=args,
        accelerator=_OneProcess(),
        model=SimpleNamespace(training=False),
        loss_type=args.loss_type,
        beta=0.0,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        importance_sampling_level=args.importance_sampling_level,
        top_entropy_quantile=args.top_entropy_quantile,
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (rollouts["policy"], rollouts["entropy"], None),
    )
    trainer.get_high_entropy_mask = lambda *given: GRPOTrainer.get_high_entropy_mask(trainer, *given)
    mask = rollouts["mask"]
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.int64),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.int64),
        "completion_mask": mask.long(),
        "advantages": ADVANTAGES,
        "old_per_token_logps": rollouts["old"],
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss


def padded_rollouts() -> dict[str, Tensor]:
    """Log-probs and entropies [6, 8]; what is behind a response must not matter."""
    draw = torch.Generator().manual_seed(2)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(len(LENGTHS), WIDTH, generator=draw, dtype=torch.float64)

    old = -0.2 - noise(1.5).abs()
    return {
        "mask": torch.arange(WIDTH) < LENGTHS.unsqueeze(1),
        "old": old,
        "policy": (old + noise(0.4)).clamp(max=-0.01).requires_grad_(),
        "entropy": noise(1.0).abs().float().double(),  # TRL takes the quantile in float32
    }


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_trl(case: str, tmp_path: Any) -> None:
    theirs, ours = CASES[case]
    rollouts = padded_rollouts()
    mask, policy = rollouts["mask"], rollouts["policy"]
    expected = trl_loss(theirs, rollouts, tmp_path)
    [expected_gradient] = torch.autograd.grad(expected, policy)

    logprobs_N, old_N, entropy_N = (rollouts[name][mask] for name in ("policy", "old", "entropy"))
    low_N = None
    if share := ours.get("top_entropy"):
        low_N = entropy_N < torch.quantile(entropy_N.float(), 1 - share)
    given = Given(
        LENGTHS,
        ADVANTAGES.repeat_interleave(LENGTHS),
        old_N,
        sampled_logprobs_N=old_N,
        low_entropy_N=low_N,
    )
    step = Step(len(LENGTHS), int(LENGTHS.sum()), WIDTH)
    loss, part = batch_loss(logprobs_N, entropy_N, given, Objective(**ours), step)
    [gradient] = torch.autograd.grad(loss, policy)
    tolerance = 1e-6 if case == "sapo" else 1e-12  # TRL has the temperature 1.05 in float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()
    assert (part.off_policy > 0) == ("off_policy_mask" in ours)
    assert (part.low_entropy > 0) == ("top_entropy" in ours)


@pytest.mark.parametrize("case", ["sapo, other temperatures", "vespo", "cispo", "both masks"])
def test_the_restatement_agrees_with_trl_too(case: str, tmp_path: Any) -> None:
    theirs, ours = CASES[case]
    rollouts = padded_rollouts()
    rows = [
        Response(
            float(ADVANTAGES[i]),
            rollouts["policy"][i, :n].tolist(),
            rollouts["old"][i, :n].tolist(),
            [0.0] * n,
            [True] * n,
            rollouts["old"][i, :n].tolist(),
            rollouts["entropy"][i, :n].tolist(),
        )
        for i, n in enumerate(LENGTHS.tolist())
    ]
    found = restatement.loss(rows, restatement.Objective(**{"kl_coefficient": 0.0, **ours}))
    assert found.loss == pytest.approx(trl_loss(theirs, rollouts, tmp_path).item(), rel=1e-12)
