"""learner: the policy in training, its optimiser and the frozen reference, kept between iterations.

In a torch.distributed group each process takes its share of every step, and all of them the same step.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from grpo.config import UpdateConfig
from grpo.errors import EngineError
from grpo.models.loading import copy_weights, load_model
from grpo.models.turns import SHARE
from grpo.models.weights import Weights
from grpo.update import parallel
from grpo.update.adapter import add_adapter, load_adapter, reset_adapter
from grpo.update.batch import Rollouts, room_for
from grpo.update.checkpoint import load_optimizer
from grpo.update.given import Step
from grpo.update.layout import ByRow, Layout, MicroBatch, by_row, plan, tree_of
from grpo.update.network import Compared, Network, check_layouts
from grpo.update.objective import Stored, Sums, batch_loss, given_of, name_keys, objective_of
from grpo.update.opening import open_policy, open_reference
from grpo.update.optimizer import make_optimizer, settings_of
from grpo.update.own_surrogate import NotFiniteError
from grpo.update.plan import resolved
from grpo.update.residence import Residence, tensors_of

if TYPE_CHECKING:
    from peft import PeftModel


class Learner:
    """Weights, AdamW and the reference.

    `objective` is what the configuration says, and a surrogate of the user's is set there. `holds` is
    the id of the policy in memory, as it was committed; None while it is ahead of that.
    """

    optimizer: torch.optim.Optimizer  # there once load() was called, as the policy's network is

    def __init__(
        self,
        config: UpdateConfig,
        device: str,
        seed: int = 0,
        attention: str = "auto",
        others_share: float = SHARE,
    ) -> None:
        self.device = device
        self.config, self.objective = resolved(config, on_gpu=device != "cpu"), objective_of(config)
        self.residence = Residence(device, others_share)
        self.seed = seed  # of a new adapter
        self.attention = attention  # as load_model takes it
        self.holds: str | None = None
        self.adapter: PeftModel | None = None  # in training on the policy's frozen weights
        self._networks: dict[str, Network] = {}  # `policy`, and `reference` where that is no adapter's base
        self.reference_id: str | None = None  # of what is in memory
        self._reference_differences: dict[tuple[int, int], Compared] = {}  # by what was compared

    @property
    def network(self) -> Network:
        """The policy; load() must have been called."""
        return self._networks["policy"]

    @property
    def model(self) -> PreTrainedModel:
        """The policy's model."""
        return self.network.model

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layout that each model is read in, by its name."""
        return {name: network.layout for name, network in self._networks.items()}

    def use(self, layouts: Mapping[str, Layout]) -> None:
        """Read each model in the layout of its name from now on."""
        for name, network in self._networks.items():
            network.use(layouts.get(name, network.layout))

    def configure(self, config: UpdateConfig) -> None:
        """Go on under `config` with what is in memory; what trains and the optimiser stay."""
        self.config, self.objective = resolved(config, on_gpu=self.device != "cpu"), objective_of(config)
        policy = self._networks.pop("policy", None)
        self._networks, self.reference_id = {}, None  # its weights may be of another type now
        if policy is not None:
            self._networks["policy"] = open_policy(policy.model, self.config)
            self.optimizer.param_groups[0].update(settings_of(config))

    def load(
        self, policy: Path, optimizer: Path | None, id_: str | None = None, adapter: Path | None = None
    ) -> None:
        """Take the policy `id_` and its optimiser state from disk.

        With update.lora, `policy` is the starting policy, and `adapter` what was trained on it since.
        """
        self.resume()
        self.holds = None
        lora = self.config.lora
        # What trains whole has no other copy of what it was.
        anew = lora is not None and bool(lora.modules_to_save) and adapter is None
        if "policy" not in self._networks or anew:
            self._open_policy(policy)
        elif self.adapter is None:
            copy_weights(self.model, policy)
        if self.adapter is not None and adapter is not None:
            load_adapter(self.adapter, adapter)
        elif self.adapter is not None:
            reset_adapter(self.model, self.seed)
        self.optimizer.state.clear()
        if optimizer is not None:
            load_optimizer(self.optimizer, self.model, optimizer)
        self.network.refresh()
        self.holds = id_

    def load_reference(self, checkpoint: Path, id_: str | None = None, *, is_start: bool = False) -> None:
        """Take the frozen reference `id_` from disk, unless it is what is in memory.

        is_start: it is the starting policy, which an adapter's base is where nothing else trains.
        """
        lora = self.config.lora
        if is_start and lora is not None and not lora.modules_to_save:
            self._networks.pop("reference", None)
        elif "reference" not in self._networks:
            model = load_model(checkpoint, self.device, self.attention)
            self._networks["reference"] = open_reference(model, self.config)
        elif id_ != self.reference_id:
            copy_weights(self._networks["reference"].model, checkpoint)
        if id_ != self.reference_id:
            self.reference_id, self._reference_differences = id_, {}

    def _open_policy(self, checkpoint: Path) -> None:
        config, model = self.config, load_model(checkpoint, self.device, self.attention)
        if lora := config.lora:
            self.adapter = add_adapter(model, lora, self.seed)
        self._networks["policy"] = open_policy(model, config)
        self.optimizer = make_optimizer(config, model.parameters())

    def resume(self) -> None:
        """Take the accelerator again, with what release() left in main memory."""
        if self.residence.is_away:
            self.residence.arrive(self._tensors())
            for network in self._networks.values():
                network.refresh()

    def lend(self, start: Path) -> Weights:
        """The policy's weights themselves, for an engine; `start` is the checkpoint that it started from."""
        return Weights(self.model, start)

    def release(self) -> None:
        """Leave the accelerator until resume(), unless others have their share of it; gradients go anyway."""
        for network in self._networks.values():
            network.model.zero_grad(set_to_none=True)
        if self.device != "cpu" and not self.residence.may_stay():
            for network in self._networks.values():
                network.drop_copy()
            self.residence.leave(self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        models = {name: network.model for name, network in self._networks.items()}
        return tensors_of(models, self.optimizer if "policy" in models else None)

    def check_layout(
        self, rollouts: Rollouts, longest: tuple[int, int], last: str | None = None
    ) -> dict[str, Any]:
        """Compare how groups are read with reading a rollout alone, and read them alone where that differs.

        Compared are the longest rollout and one of made-up tokens, as long as the run allows: `longest`
        tokens of prompt and response; of the reference that one alone. Not of the policy where the update
        before read in this layout (`last`, from its manifest: a process that resumes must decide the same).
        Returns the layout, and the largest difference of a log-prob.
        """
        limit = max(self.config.max_tokens_per_batch // 2, 1)  # no tree is larger than a micro-batch
        lengths = (min(longest[0], limit), min(longest[1], limit))
        found = check_layouts(self._networks, rollouts, lengths, last, self._reference_differences)
        return {"layout": self.network.layout, **found}

    def reference_logprobs(self, rollouts: Rollouts, rows: np.ndarray) -> ByRow:
        """Log-probs of the reference, float32 [T_i] for each of `rows`."""
        if reference := self._networks.get("reference"):
            return self._read(reference, rollouts, rows)[0]
        assert self.adapter is not None
        with self.adapter.disable_adapter():
            return self.policy_logprobs(rollouts, rows)

    def policy_logprobs(self, rollouts: Rollouts, rows: np.ndarray) -> ByRow:
        """Log-probs of the policy as it is now, likewise."""
        return self._read(self.network, rollouts, rows)[0]

    def policy_entropies(self, rollouts: Rollouts, rows: np.ndarray) -> tuple[ByRow, ByRow]:
        """The same, and the entropy at each token in nats."""
        return self._read(self.network, rollouts, rows, with_entropy=True)

    @torch.no_grad()
    def _read(
        self, network: Network, rollouts: Rollouts, rows: np.ndarray, *, with_entropy: bool = False
    ) -> tuple[ByRow, ByRow]:
        rooms = room_for(rollouts, rows), room_for(rollouts, rows if with_entropy else rows[:0])
        found: tuple[ByRow, ByRow] = ({}, {})
        for batch in self._micro_batches(network, rollouts, rows, parallel.share()):
            values = network.logprobs(batch, with_entropy=with_entropy)
            for known, values_N, room in zip(found, values, rooms, strict=True):
                known.update(by_row(batch, values_N, room) if values_N is not None else {})
        # Of all processes: shares of another cut need other rows.
        parts = parallel.gathered(found)
        logprobs, entropies = ({row: x for part in parts for row, x in part[n].items()} for n in (0, 1))
        return logprobs, entropies

    def _micro_batches(
        self, network: Network, rollouts: Rollouts, rows: np.ndarray, share: tuple[int, int]
    ) -> Iterator[MicroBatch]:
        max_tokens = self.config.max_tokens_per_batch
        for sequences in plan(rollouts, rows, max_tokens, network.layout, network.cost, share):
            yield network.batch(rollouts, sequences)

    def step(
        self,
        rollouts: Rollouts,
        rows: np.ndarray,
        step: Step,
        stored: Stored,
        learning_rate: float | None = None,
        on_read: Callable[[ByRow], object] = dict,
    ) -> tuple[dict[str, Any], ByRow]:
        """One optimiser step that reads `rows`, of all that `step` counts.

        Returns its columns of `updates` but for the mismatch, and the policy's log-probs of what it read.
        learning_rate: None is the configured one. on_read: told log-probs before their gradient. Raises
        EngineError (exit 8) naming the rollouts when loss or gradient are not finite; no step is taken.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums, logprobs, room = Sums(), ByRow(), room_for(rollouts, rows)
        for batch in self._micro_batches(self.network, rollouts, rows, parallel.share()):
            loss, part, own = self._forward(rollouts, batch, step, stored, room)
            on_read(own)
            loss.backward()  # type: ignore[no-untyped-call]
            sums, logprobs = sums + part, logprobs | own
        parallel.add_up_gradients(self.model)
        grad_norm = self._clip_gradient(rollouts, rows, step, stored)
        rate = self.config.learning_rate if learning_rate is None else learning_rate
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.network.refresh()
        whole = sum(parallel.gathered(sums), Sums())
        return {**whole.row(self.objective), "grad_norm": grad_norm}, logprobs

    def _forward(
        self, rollouts: Rollouts, batch: MicroBatch, step: Step, stored: Stored, room: ByRow
    ) -> tuple[torch.Tensor, Sums, ByRow]:
        """This micro-batch's loss, its part of the step's numbers, and the policy's log-probs."""
        logprobs_N, entropy_N = self.network.logprobs(batch, with_entropy=True)
        assert entropy_N is not None
        own = by_row(batch, logprobs_N, room)
        if not bool(logprobs_N.isfinite().all()):
            # NaN reaches what it shares a sequence with, masked or not.
            own = self._broken_alone(rollouts, batch) or own
        given = given_of(self.config, self.objective, step, rollouts, batch, stored, own)
        try:
            loss, part = batch_loss(logprobs_N, entropy_N, given, self.objective, step)
        except NotFiniteError as found:
            broken = batch.rows[found.rollouts].tolist()
            raise EngineError(f"{found} on {name_keys(rollouts, broken)}") from None
        if not math.isfinite(loss.item()):
            raise EngineError(f"update: the loss is {loss.item()} on {name_keys(rollouts, list(own))}")
        return loss, part, own

    @torch.no_grad()
    def _broken_alone(self, rollouts: Rollouts, batch: MicroBatch) -> ByRow:
        """Log-probs of those rollouts of the batch that are not finite when each is read by itself."""
        room = room_for(rollouts, batch.rows)
        for row in room:
            single = self.network.batch(rollouts, [[tree_of(rollouts, [row])]])
            by_row(single, self.network.logprobs(single)[0], room)
        return {row: values for row, values in room.items() if not np.isfinite(values).all()}

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
        alone = np.array([row])
        for batch in self._micro_batches(self.network, rollouts, alone, (0, 1)):
            loss, _, _ = self._forward(rollouts, batch, step, stored, room_for(rollouts, alone))
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return all(bool(gradient.isfinite().all()) for gradient in gradients)
