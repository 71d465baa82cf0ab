"""learner: the policy in training, its optimiser and the frozen reference, kept between iterations.

What is in memory is always what is on disk: `holds` names the ids of the policy and optimiser that were
last loaded or saved, and anything else is loaded again. So an interrupted run goes on with the same bits.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config import UpdateConfig
from grpo.errors import EngineError
from grpo.logprobs import token_logprobs
from grpo.model import copy_weights, empty_cache, load_model
from grpo.update.batch import MicroBatch, Rollouts, gather, micro_batches
from grpo.update.checkpoint import load_optimizer
from grpo.update.loss import Step, aggregate_tokens, kl_estimate, policy_loss, sampler_weights

_MAX_KEYS_NAMED = 8


@dataclass
class Stored:
    """Log-probs of an iteration's kept rollouts, by row of Rollouts; float32, one per counted token."""

    policy: dict[int, np.ndarray] = field(default_factory=dict)
    """The learner's own when it first read the rollout: before its first step, where pi_old is recomputed."""
    reference: dict[int, np.ndarray] = field(default_factory=dict)
    first_step: dict[int, int] = field(default_factory=dict)


class Learner:
    """Weights, AdamW and the reference. `config` is fixed for the life of the object."""

    def __init__(self, config: UpdateConfig, device: str) -> None:
        self.config = config
        self.device = device
        self.holds: tuple[str | None, str | None] = (None, None)
        self._model: PreTrainedModel | None = None
        self._optimizer: torch.optim.AdamW | None = None
        self._reference: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The policy; load() must have been called."""
        assert self._model is not None
        return self._model

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """The optimiser; load() must have been called."""
        assert self._optimizer is not None
        return self._optimizer

    def load(self, policy: Path, optimizer: Path | None, ids: tuple[str, str | None]) -> None:
        """Take the policy and optimiser state `ids` from disk, unless they are what is in memory."""
        self._move(self.device)
        if self.holds == ids:
            return
        self.holds = (None, None)
        if self._model is None:
            self._model = load_model(policy, self.device)
            self._optimizer = torch.optim.AdamW(
                self._model.parameters(),
                lr=self.config.learning_rate,
                betas=(self.config.betas[0], self.config.betas[1]),
                eps=self.config.adam_epsilon,
                weight_decay=self.config.weight_decay,
                fused=True,
            )
        else:
            copy_weights(self._model, policy)
        self.optimizer.state.clear()
        if optimizer is not None:
            load_optimizer(self.optimizer, self.model, optimizer)
        self.holds = ids

    def release(self) -> None:
        """Leave the accelerator until the next load(); what is held stays as it is, in main memory."""
        if self.device == "cpu":
            return
        self._move("cpu")
        empty_cache(self.device)

    def _move(self, device: str) -> None:
        for model in (self._model, self._reference):
            if model is not None:
                model.zero_grad(set_to_none=True)
                torch.nn.Module.to(model, device)
        for moments in self._optimizer.state.values() if self._optimizer is not None else ():
            for name, tensor in moments.items():
                moments[name] = tensor.to(device)

    def load_reference(self, checkpoint: Path) -> None:
        """Load the frozen reference once."""
        if self._reference is None:
            self._reference = load_model(checkpoint, self.device).requires_grad_(False)

    def reference_logprobs(self, rollouts: Rollouts, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Log-probs of the reference for each of `rows`."""
        assert self._reference is not None
        return self._no_grad_logprobs(self._reference, rollouts, rows)

    def policy_logprobs(self, rollouts: Rollouts, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Log-probs of the policy as it is now for each of `rows`."""
        return self._no_grad_logprobs(self.model, rollouts, rows)

    @torch.inference_mode()
    def _no_grad_logprobs(
        self, model: PreTrainedModel, rollouts: Rollouts, rows: np.ndarray
    ) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for batch in micro_batches(rollouts, rows, self.config.max_tokens_per_batch, self.device):
            logprobs_N, _ = _forward(model, batch, with_entropy=False)
            found |= _by_row(batch, logprobs_N)
        return found

    def step(
        self, rollouts: Rollouts, rows: np.ndarray, step: Step, stored: Stored, number: int
    ) -> dict[str, Any]:
        """One optimiser step on `rows`; returns its columns of `updates` (numbers, not yet the mismatch).

        `stored` gains the policy's log-probs of rows that are read for the first time. Raises EngineError
        (exit 8) naming the rollouts when the loss or the gradient is not finite; no step is taken.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums = dict.fromkeys(("policy_loss", "kl", "entropy", "ratio", "ratios", "low", "high"), 0.0)
        largest = 0.0
        for batch in micro_batches(rollouts, rows, self.config.max_tokens_per_batch, self.device):
            part, ratio_R = self._backward(rollouts, batch, step, stored, number)
            advantage_R = _advantages(rollouts, batch, ratio_R)
            sums["ratio"] += ratio_R.sum(dtype=torch.float64).item()
            sums["ratios"] += len(ratio_R)
            largest = max(largest, ratio_R.max().item())
            for side, clipped in zip(("low", "high"), self._clipped(ratio_R, advantage_R), strict=True):
                sums[side] += clipped
            for name, value in part.items():
                sums[name] += value
        grad_norm = self._clip_gradient(rollouts, rows, step, stored, number)
        self.optimizer.step()
        kl = sums["kl"] if self.config.kl_coefficient else None
        return {
            "loss": sums["policy_loss"] + self.config.kl_coefficient * sums["kl"],
            "policy_loss": sums["policy_loss"],
            "kl": kl,
            "entropy": sums["entropy"] / step.num_tokens,
            "ratio_mean": sums["ratio"] / sums["ratios"],
            "ratio_max": largest,
            "clip_fraction_low": sums["low"] / sums["ratios"],
            "clip_fraction_high": sums["high"] / sums["ratios"],
            "grad_norm": grad_norm,
        }

    def _backward(
        self, rollouts: Rollouts, batch: MicroBatch, step: Step, stored: Stored, number: int
    ) -> tuple[dict[str, float], Tensor]:
        """Add this micro-batch's gradient; returns its parts of the step's sums, and its ratios [R]."""
        config = self.config
        logprobs_N, entropy_N = _forward(self.model, batch, with_entropy=True)
        own = _by_row(batch, logprobs_N)
        _check_finite(rollouts, own, stored)
        for row in own:
            stored.policy.setdefault(row, own[row])
            stored.first_step.setdefault(row, number)
        policy_term, ratio_R = policy_loss(
            logprobs_N,
            self._old_logprobs(rollouts, batch, stored),
            torch.from_numpy(rollouts.advantages[batch.rows]).float().to(self.device),
            batch.lengths_B,
            ratio=config.ratio,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            aggregate=config.aggregate,
            step=step,
            weights_R=self._sampler_weights(rollouts, batch, stored),
        )
        loss, kl = policy_term, 0.0
        if config.kl_coefficient:
            reference_N = gather(stored.reference, batch.rows, self.device)
            kl_N = kl_estimate(logprobs_N, reference_N, config.kl_estimator)
            kl_term = aggregate_tokens(kl_N, batch.lengths_B, config.aggregate, step)
            loss, kl = policy_term + config.kl_coefficient * kl_term, kl_term.item()
        if not math.isfinite(loss.item()):
            raise EngineError(
                f"update: the loss is {loss.item()} on {_name_keys(rollouts, list(batch.rows))}"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        assert entropy_N is not None
        entropy = entropy_N.detach().sum(dtype=torch.float64).item()
        return {"policy_loss": policy_term.item(), "kl": kl, "entropy": entropy}, ratio_R

    def _old_logprobs(self, rollouts: Rollouts, batch: MicroBatch, stored: Stored) -> Tensor:
        """pi_old of the batch, [N]: what the sampler stored, or the learner's own before its first step."""
        source = rollouts.old_logprobs if self.config.old_logprobs == "sampled" else stored.policy
        return gather(source, batch.rows, self.device)

    def _sampler_weights(self, rollouts: Rollouts, batch: MicroBatch, stored: Stored) -> Tensor | None:
        """Weight of each surrogate value of the batch, [R]; None without a correction."""
        config = self.config
        if config.sampler_correction == "none":
            return None
        return sampler_weights(
            gather(stored.policy, batch.rows, self.device),
            gather(rollouts.old_logprobs, batch.rows, self.device),
            batch.lengths_B,
            ratio=config.ratio,
            correction=config.sampler_correction,
            level=config.sampler_correction_level,
            cap=config.sampler_correction_cap,
        )

    def _clipped(self, ratio_R: Tensor, advantage_R: Tensor) -> tuple[float, float]:
        """How many ratios the clip took out of the gradient, below and above."""
        low, high = self.config.clip_low, self.config.clip_high
        below = 0 if low is None else int(((ratio_R < 1 - low) & (advantage_R < 0)).sum())
        above = 0 if high is None else int(((ratio_R > 1 + high) & (advantage_R > 0)).sum())
        return float(below), float(above)

    def _clip_gradient(
        self, rollouts: Rollouts, rows: np.ndarray, step: Step, stored: Stored, number: int
    ) -> float:
        """Norm of the gradient, which is then scaled down to max_grad_norm."""
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        if not math.isfinite(norm):
            broken = [
                row for row in rows if not self._gradient_is_finite(rollouts, row, step, stored, number)
            ]
            raise EngineError(
                f"update: the gradient is {norm} on {_name_keys(rollouts, broken or list(rows))}"
            )
        return norm

    def _gradient_is_finite(
        self, rollouts: Rollouts, row: int, step: Step, stored: Stored, number: int
    ) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        [batch] = micro_batches(rollouts, np.array([row]), self.config.max_tokens_per_batch, self.device)
        self._backward(rollouts, batch, step, stored, number)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return all(bool(gradient.isfinite().all()) for gradient in gradients)


def _forward(
    model: PreTrainedModel, batch: MicroBatch, *, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropy of the batch's counted tokens, float32 [N]."""
    # Right padding under causal attention: no real token ever sees it, so no mask is needed.
    logits_BLV = model(input_ids=batch.input_ids_BL, use_cache=False).logits
    logits_NV = logits_BLV[batch.rows_N, batch.columns_N]
    return token_logprobs(logits_NV, batch.targets_N, batch.temperature_N, with_entropy=with_entropy)


def _check_finite(rollouts: Rollouts, own: dict[int, np.ndarray], stored: Stored) -> None:
    """Raise EngineError naming rollouts with a log-prob that is not finite: clipping would hide it."""
    old = {row: rollouts.old_logprobs[row] for row in own}
    reference = {row: stored.reference[row] for row in own if row in stored.reference}
    for name, values in (("policy", own), ("old", old), ("reference", reference)):
        if broken := [row for row in values if not np.isfinite(values[row]).all()]:
            raise EngineError(f"update: {name}_logprobs are not finite on {_name_keys(rollouts, broken)}")


def _by_row(batch: MicroBatch, values_N: Tensor) -> dict[int, np.ndarray]:
    """Split values of a micro-batch by rollout."""
    parts = np.split(values_N.detach().float().cpu().numpy(), np.cumsum(batch.lengths_B.cpu().numpy())[:-1])
    return {int(row): part for row, part in zip(batch.rows, parts, strict=True)}


def _advantages(rollouts: Rollouts, batch: MicroBatch, ratio_R: Tensor) -> Tensor:
    """Advantage belonging to each ratio."""
    advantages_B = torch.from_numpy(rollouts.advantages[batch.rows]).to(ratio_R.device)
    per_rollout = len(ratio_R) == len(advantages_B)
    return advantages_B if per_rollout else torch.repeat_interleave(advantages_B, batch.lengths_B)


def _name_keys(rollouts: Rollouts, rows: list[int]) -> str:
    keys = [tuple(int(part) for part in rollouts.keys[row]) for row in rows[:_MAX_KEYS_NAMED]]
    more = f" and {len(rows) - len(keys)} more" if len(rows) > len(keys) else ""
    return (
        f"rollouts (iteration, group_id, sample_id) {', '.join(map(str, keys))}{more}; nothing was committed"
    )
