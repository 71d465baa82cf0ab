"""learner: the policy in training, its optimiser and the frozen reference, kept between iterations.

What is in memory is always what is on disk: `holds` names the ids of what was last loaded or saved, and
anything else is loaded again. So an interrupted run goes on with the same bits.

In a torch.distributed group each process takes its share of every step, and all of them the same step.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from grpo.config import UpdateConfig
from grpo.errors import EngineError
from grpo.models.loading import copy_weights, load_model
from grpo.update import parallel
from grpo.update.adapter import adapter_off, add_adapter, load_adapter, reset_adapter
from grpo.update.batch import Rollouts, longest_pair, made_up_pair, room_for
from grpo.update.checkpoint import load_optimizer
from grpo.update.layout import MicroBatch, build, micro_batches, tree_of
from grpo.update.loss import Step
from grpo.update.network import TOLERANCE, Network
from grpo.update.objective import Stored, Sums, batch_loss, given_of, name_keys, objective_of

if TYPE_CHECKING:
    from peft import PeftModel


class Taken(NamedTuple):
    """A step that was taken: its columns of `updates`, and the policy's log-probs of the rows it read."""

    row: dict[str, Any]
    logprobs: dict[int, np.ndarray]


class Learner:
    """Weights, AdamW and the reference. `config` is fixed for the life of the object."""

    def __init__(self, config: UpdateConfig, device: str, seed: int = 0) -> None:
        self.config = config
        self.objective = objective_of(config)
        self.device = device
        self.seed = seed  # of a new adapter
        self.holds: tuple[str | None, str | None] = (None, None)
        self._network: Network | None = None
        self._optimizer: torch.optim.AdamW | None = None
        self.adapter: PeftModel | None = None  # in training on the policy's frozen weights
        self._reference: Network | None = None
        self._reference_differences: dict[tuple[int, int], float] = {}  # by what was compared; weights stay

    @property
    def network(self) -> Network:
        """The policy; load() must have been called."""
        assert self._network is not None
        return self._network

    @property
    def model(self) -> PreTrainedModel:
        """The policy's model."""
        return self.network.model

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """The optimiser; load() must have been called."""
        assert self._optimizer is not None
        return self._optimizer

    def load(
        self,
        policy: Path,
        optimizer: Path | None,
        ids: tuple[str | None, str | None],
        adapter: Path | None = None,
    ) -> None:
        """Take the policy and optimiser state `ids` from disk, unless they are what is in memory.

        With update.lora, `policy` is the starting policy, and `adapter` what was trained on it since.
        """
        self._move(self.device)
        if self.holds == ids:
            return
        self.holds = (None, None)
        if self._network is None:
            self._network = self._open_policy(policy)
            self._optimizer = torch.optim.AdamW(
                [p for p in self.model.parameters() if p.requires_grad],
                lr=self.config.learning_rate,
                betas=(self.config.betas[0], self.config.betas[1]),
                eps=self.config.adam_epsilon,
                weight_decay=self.config.weight_decay,
                fused=True,
            )
        elif self.adapter is None:
            copy_weights(self.model, policy)
        if self.adapter is not None:
            if adapter is None:
                reset_adapter(self.adapter, self.seed)
            else:
                load_adapter(self.adapter, adapter)
        self.optimizer.state.clear()
        if optimizer is not None:
            load_optimizer(self.optimizer, self.model, optimizer)
        self.holds = ids

    def load_reference(self, checkpoint: Path, *, is_start: bool = False) -> None:
        """Load the frozen reference once. is_start: it is the starting policy, which an adapter's base is."""
        if self._reference is not None:
            return
        if is_start and self.adapter is not None:
            self._reference = self.network
            return
        model = load_model(checkpoint, self.device).requires_grad_(False)
        self._reference = self._open(model)

    def _open_policy(self, checkpoint: Path) -> Network:
        model = load_model(checkpoint, self.device)
        if lora := self.config.lora:
            self.adapter = add_adapter(model, lora.rank, lora.alpha, lora.targets, self.seed)
        network = self._open(model)
        if self.config.gradient_checkpointing:
            network.checkpoint_gradients()
        return network

    def _open(self, model: PreTrainedModel) -> Network:
        return Network(model, self.config.precision, share_prompts=self.config.prompt_sharing == "auto")

    def release(self) -> None:
        """Leave the accelerator until the next load(); what is held stays as it is, in main memory."""
        if self.device != "cpu":
            self._move("cpu")
            torch.cuda.empty_cache()

    def _move(self, device: str) -> None:
        for network in (self._network, self._reference):
            if network is not None:
                network.model.zero_grad(set_to_none=True)
                torch.nn.Module.to(network.model, device)
        for moments in self._optimizer.state.values() if self._optimizer is not None else ():
            for name, tensor in moments.items():
                moments[name] = tensor.to(device)

    def check_layout(
        self, rollouts: Rollouts, longest: tuple[int, int], last: str | None = None
    ) -> dict[str, Any]:
        """Compare how groups are read with reading a rollout alone, and read them alone where that differs.

        Compared are the longest rollout and, unless the update before read in this layout (`last`, from its
        manifest: a process that resumes must decide the same), one of made-up tokens, as long as the run
        allows: `longest` tokens of prompt and response. Of the reference, whose weights stay, that one alone.
        Returns the layout, and the largest difference of a log-prob.
        """
        limit = max(self.config.max_tokens_per_batch // 2, 1)  # no tree is larger than a micro-batch
        vocabulary = int(self.model.config.get_text_config(decoder=True).vocab_size)
        lengths = (min(longest[0], limit), min(longest[1], limit))
        made_up = (made_up_pair(*lengths, vocabulary), np.arange(2))
        found: dict[str, Any] = {}
        reference = None if self._reference is self._network else self._reference
        for name, network in (("policy", self._network), ("reference", reference)):
            if network is None or network.best == "rows":
                continue
            network.use(network.best)
            if name == "policy":
                pairs = [] if last == network.best else [made_up]
                pairs += [(rollouts, longest_pair(rollouts))] if len(rollouts) else []
                differences = [network.difference(*pair) for pair in pairs]
            else:
                if lengths not in self._reference_differences:
                    self._reference_differences[lengths] = network.difference(*made_up)
                differences = [self._reference_differences[lengths]]
            found[f"{name}_layout_difference"] = max(differences, default=None)
            if not all(difference <= TOLERANCE for difference in differences):  # NaN is not
                found[f"{name}_layout_refused"] = network.best
                network.use("rows")
        return {"layout": self.network.layout, **found}

    def reference_logprobs(self, rollouts: Rollouts, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Log-probs of the reference, float32 [T_i] for each of `rows`."""
        assert self._reference is not None
        shares_base = self.adapter is not None and self._reference is self._network
        with adapter_off(self.adapter) if shares_base else nullcontext():
            return self._no_grad_logprobs(self._reference, rollouts, rows)

    def policy_logprobs(self, rollouts: Rollouts, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Log-probs of the policy as it is now, likewise."""
        return self._no_grad_logprobs(self.network, rollouts, rows)

    @torch.no_grad()
    def _no_grad_logprobs(
        self, network: Network, rollouts: Rollouts, rows: np.ndarray
    ) -> dict[int, np.ndarray]:
        room = room_for(rollouts, rows)
        found: dict[int, np.ndarray] = {}
        for batch in self._micro_batches(network, rollouts, rows):
            found |= put(by_row(batch, network.logprobs(batch)[0]), room)
        return parallel.exchange(found)

    def _micro_batches(
        self, network: Network, rollouts: Rollouts, rows: np.ndarray, share: tuple[int, int] | None = None
    ) -> Iterator[MicroBatch]:
        return micro_batches(
            rollouts,
            rows,
            self.config.max_tokens_per_batch,
            network.layout,
            network.cost,
            self.device,
            share or parallel.share(),
        )

    def step(
        self,
        rollouts: Rollouts,
        rows: np.ndarray,
        step: Step,
        stored: Stored,
        learning_rate: float | None = None,
    ) -> Taken:
        """One optimiser step that reads `rows`, of all that `step` counts; the row lacks the mismatch.

        learning_rate: None is the configured one. Raises EngineError (exit 8) naming the rollouts when the
        loss or the gradient is not finite; no step is taken.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums, room = Sums(), room_for(rollouts, rows)
        logprobs: dict[int, np.ndarray] = {}
        for batch in self._micro_batches(self.network, rollouts, rows):
            part, own = self._backward(rollouts, batch, step, stored)
            sums.add(part)
            logprobs |= put(own, room)
        parallel.add_up_gradients(self.model)
        grad_norm = self._clip_gradient(rollouts, rows, step, stored)
        rate = self.config.learning_rate if learning_rate is None else learning_rate
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return Taken({**parallel.total(sums).row(self.objective), "grad_norm": grad_norm}, logprobs)

    def _backward(
        self, rollouts: Rollouts, batch: MicroBatch, step: Step, stored: Stored
    ) -> tuple[Sums, dict[int, np.ndarray]]:
        """Add this micro-batch's gradient; its part of the step's numbers, and the policy's log-probs."""
        logprobs_N, entropy_N = self.network.logprobs(batch, with_entropy=True)
        assert entropy_N is not None
        own = by_row(batch, logprobs_N)
        if not bool(logprobs_N.isfinite().all()):
            # NaN reaches what it shares a sequence with, masked or not.
            own = self._alone(rollouts, batch) or own
        given = given_of(self.config, rollouts, batch, stored, own)
        loss, part = batch_loss(logprobs_N, entropy_N, given, self.objective, step)
        if not math.isfinite(loss.item()):
            raise EngineError(f"update: the loss is {loss.item()} on {name_keys(rollouts, list(own))}")
        loss.backward()  # type: ignore[no-untyped-call]
        return part, own

    @torch.no_grad()
    def _alone(self, rollouts: Rollouts, batch: MicroBatch) -> dict[int, np.ndarray]:
        """Log-probs of those rollouts of the batch that are not finite when each is read by itself."""
        found: dict[int, np.ndarray] = {}
        for row in batch.rows.tolist():
            single = build(rollouts, [[tree_of(rollouts, [row])]], self.device)
            logprobs_N, _ = self.network.logprobs(single)
            if not bool(logprobs_N.isfinite().all()):
                found |= by_row(single, logprobs_N)
        return found

    def _clip_gradient(self, rollouts: Rollouts, rows: np.ndarray, step: Step, stored: Stored) -> float:
        """Norm of the gradient, which is then scaled down to max_grad_norm."""
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        if not math.isfinite(norm):
            broken = [row for row in rows if not self._gradient_is_finite(rollouts, row, step, stored)]
            raise EngineError(
                f"update: the gradient is {norm} on {name_keys(rollouts, broken or list(rows))}"
            )
        return norm

    def _gradient_is_finite(self, rollouts: Rollouts, row: int, step: Step, stored: Stored) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        for batch in self._micro_batches(self.network, rollouts, np.array([row]), share=(0, 1)):
            self._backward(rollouts, batch, step, stored)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return all(bool(gradient.isfinite().all()) for gradient in gradients)


def by_row(batch: MicroBatch, values_N: torch.Tensor) -> dict[int, np.ndarray]:
    """Split values of a micro-batch by rollout."""
    parts = np.split(values_N.detach().float().cpu().numpy(), np.cumsum(batch.lengths_B.cpu().numpy())[:-1])
    return {int(row): part for row, part in zip(batch.rows, parts, strict=True)}


def put(values: dict[int, np.ndarray], room: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Copy `values` to their places; returns those."""
    for row, values_T in values.items():
        room[row][:] = values_T
    return {row: room[row] for row in values}
