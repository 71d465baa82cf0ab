"""learner: the policy in training, its optimiser and the frozen reference, kept between iterations.

Of several processes (parallel.py) each has a part of all weights and computes a share of every step; rank 0
calls, and the others do the same.
"""

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from grpo.config import UpdateConfig
from grpo.models.loading import copy_weights, load_model
from grpo.models.reader import Reader
from grpo.models.turns import SHARE
from grpo.models.weight_check import WeightCheck, measure
from grpo.models.weights import Weights
from grpo.update.adapter import add_adapter, load_adapter, reset_adapter
from grpo.update.batch import Rollouts
from grpo.update.checkpoint import copy_to, load_optimizer
from grpo.update.collective import collective
from grpo.update.execution import weights_digest
from grpo.update.given import Step
from grpo.update.layout import ByRow, Layout
from grpo.update.layout_check import Compared, check_layouts
from grpo.update.network import Network
from grpo.update.objective import Stored, objective_of
from grpo.update.opening import copy_shared, open_policy, open_reference, shared_reader, wait_for
from grpo.update.optimizer import make_optimizer, settings_of
from grpo.update.optimizer_step import Told, take_step
from grpo.update.plan import resolved
from grpo.update.reading import read
from grpo.update.residence import Residence, tensors_of

if TYPE_CHECKING:
    from peft import PeftModel

    from grpo.update.parallel import Ranks
    from grpo.update.rank_files import Writing
    from grpo.update.sharding import Skeleton


class Learner:
    """Weights, AdamW and the reference.

    `objective` is what the configuration says, and a surrogate of the user's is set there. `holds` is
    the id of the policy in memory, as it was committed; None while it is ahead of that. ranks: the processes
    that compute together, where there are several.
    """

    optimizer: torch.optim.Optimizer  # there once load() was called, as the policy's network is

    def __init__(
        self,
        config: UpdateConfig,
        device: str,
        seed: int = 0,
        attention: str = "auto",
        others_share: float = SHARE,
        ranks: "Ranks | None" = None,
    ) -> None:
        self.device, self.ranks = device, ranks
        self.made_with = (config, device, seed, attention, others_share)
        self.config, self.objective = resolved(config, on_gpu=device != "cpu"), objective_of(config)
        self.residence = Residence(device, others_share)
        self.seed = seed  # of a new adapter
        self.attention = attention  # as load_model takes it
        self.holds: str | None = None
        self.adapter: PeftModel | None = None  # in training on the policy's frozen weights
        self.skeleton: Skeleton | None = None  # of what trains, where it is shared out
        self.writing: Writing | None = None  # of a checkpoint that several processes write
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

    @collective
    def use(self, layouts: Mapping[str, Layout]) -> None:
        """Read each model in the layout of its name from now on."""
        for name, network in self._networks.items():
            network.use(layouts.get(name, network.layout))

    @collective
    def configure(self, config: UpdateConfig) -> None:
        """Go on under `config` with what is in memory; what trains and the optimiser stay."""
        self.config, self.objective = resolved(config, on_gpu=self.device != "cpu"), objective_of(config)
        policy = self._networks.pop("policy", None)
        self._networks, self.reference_id = {}, None  # its weights may be of another type now
        if policy is not None:
            self._networks["policy"] = open_policy(policy.reader, self.config, self.ranks)
            self.optimizer.param_groups[0].update(settings_of(config))

    @collective
    def load(
        self, policy: Path, optimizer: Path | None, id_: str | None = None, adapter: Path | None = None
    ) -> None:
        """Take the policy `id_` and its optimiser state from disk.

        With update.lora, `policy` is the starting policy, and `adapter` what was trained on it since.
        """
        self.resume()
        self.holds = None
        ranks, lora = self.ranks, self.config.lora
        put = torch.Tensor.copy_ if ranks is None else ranks.put
        if ranks is not None:
            wait_for(ranks, optimizer, adapter)
        # What trains whole has no other copy of what it was.
        anew = lora is not None and bool(lora.modules_to_save) and adapter is None
        if "policy" not in self._networks or anew:
            self._open_policy(policy)
        elif self.adapter is None:
            self._copy(self.model, policy)
        if self.adapter is not None and adapter is not None:
            load_adapter(self.adapter, adapter, put)
        elif self.adapter is not None:
            reset_adapter(self.model, self.seed, put)
        self.optimizer.state.clear()
        if optimizer is not None:
            placed = copy_to if ranks is None else ranks.placed
            load_optimizer(self.optimizer, self.model, optimizer, placed)
        self.network.refresh()
        self.holds = id_

    @collective
    def load_reference(self, checkpoint: Path, id_: str | None = None, *, is_start: bool = False) -> None:
        """Take the frozen reference `id_` from disk, unless it is what is in memory.

        is_start: it is the starting policy, which an adapter's base is where nothing else trains.
        """
        lora = self.config.lora
        if is_start and lora is not None and not lora.modules_to_save:
            self._networks.pop("reference", None)
        elif "reference" not in self._networks:
            reader = self._reader(checkpoint, lambda model: model.requires_grad_(False))
            self._networks["reference"] = open_reference(reader, self.config, self.ranks)
        elif id_ != self.reference_id:
            self.reference_id = None
            self._copy(self._networks["reference"].model, checkpoint)
        if id_ != self.reference_id:
            self.reference_id, self._reference_differences = id_, {}

    def _open_policy(self, checkpoint: Path) -> None:
        reader = self._reader(checkpoint, self._prepare)
        if self.skeleton is not None:
            self.skeleton.attend(reader.model.config._attn_implementation)
        self._networks["policy"] = open_policy(reader, self.config, self.ranks)
        self.optimizer = make_optimizer(self.config, reader.model.parameters())

    def _prepare(self, model: PreTrainedModel) -> None:
        if lora := self.config.lora:
            self.adapter = add_adapter(model, lora, self.seed)
        if self.ranks is not None:
            self.skeleton = self.ranks.skeleton(model if self.adapter is None else self.adapter)

    def _reader(self, checkpoint: Path, prepare: Callable[[PreTrainedModel], object]) -> Reader:
        if self.ranks is not None:
            return shared_reader(checkpoint, self.attention, self.ranks, prepare)
        model = load_model(checkpoint, self.device, self.attention)
        prepare(model)
        return Reader(model)

    def _copy(self, model: PreTrainedModel, checkpoint: Path) -> None:
        if self.ranks is not None:
            copy_shared(model, checkpoint, self.ranks)
        else:
            copy_weights(model, checkpoint)

    def resume(self) -> None:
        """Take the accelerator again, with what release() left in main memory."""
        if self.residence.is_away:
            self.residence.arrive(self._tensors())
            for network in self._networks.values():
                network.refresh()

    def lend(self, start: Path) -> Weights:
        """The policy's weights themselves, for an engine; `start` is the checkpoint that it started from."""
        return Weights(self.whole()[0], start)

    def release(self) -> None:
        """Leave the accelerator until resume(), unless others have their share of it; gradients go anyway."""
        for network in self._networks.values():
            network.model.zero_grad(set_to_none=True)
        # The part that each of several processes has stays where it is.
        if self.device != "cpu" and self.ranks is None and not self.residence.may_stay():
            for network in self._networks.values():
                network.drop_copy()
            self.residence.leave(self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        models = {name: network.model for name, network in self._networks.items()}
        return tensors_of(models, self.optimizer if "policy" in models else None)

    @collective
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

    @collective
    def reference_logprobs(self, rollouts: Rollouts, rows: np.ndarray) -> ByRow:
        """Log-probs of the reference, float32 [T_i] for each of `rows`."""
        if reference := self._networks.get("reference"):
            return read(self, reference, rollouts, rows)[0]
        assert self.adapter is not None
        with self.adapter.disable_adapter():
            return self.policy_logprobs(rollouts, rows)

    @collective
    def policy_logprobs(self, rollouts: Rollouts, rows: np.ndarray) -> ByRow:
        """Log-probs of the policy as it is now, likewise."""
        return read(self, self.network, rollouts, rows)[0]

    @collective
    def policy_entropies(self, rollouts: Rollouts, rows: np.ndarray) -> tuple[ByRow, ByRow]:
        """The same, and the entropy at each token in nats."""
        return read(self, self.network, rollouts, rows, with_entropy=True)

    def step(
        self,
        rollouts: Rollouts,
        rows: np.ndarray,
        step: Step,
        stored: Stored,
        learning_rate: float | None = None,
        on_read: Told = dict,
    ) -> tuple[dict[str, Any], ByRow]:
        """One optimiser step that reads `rows`, of all that `step` counts.

        Returns its columns of `updates` but for the mismatch, and the policy's log-probs of what it read.
        learning_rate: None is the configured one. on_read: told log-probs before their gradient. Raises
        EngineError (exit 8) naming the rollouts when loss or gradient are not finite; no step is taken.
        """
        rate = self.config.learning_rate if learning_rate is None else learning_rate
        known = stored if self.ranks is None else stored.of(rows)  # what others need of it is sent to them
        return take_step(self, rollouts, rows, step, known, self.objective, rate, on_read=on_read)

    # Whole, where this process has a part

    @collective
    def digest(self) -> str:
        """weights_digest() of the policy."""
        return weights_digest(self.model, *([] if self.ranks is None else [self.ranks.full]))

    @collective
    def measure(self, sequences: list[list[int]]) -> WeightCheck:
        """The policy's weight check of `sequences`."""
        with self.network.exactly():
            return measure(self.network.reader, sequences)

    def whole(self) -> "tuple[PreTrainedModel, PeftModel | None]":
        """The policy's model and the adapter in it, for whoever reads the weights on rank 0.

        Of several processes these are copies in main memory.
        """
        if self.ranks is None:
            return self.model, self.adapter
        assert self.skeleton is not None
        copied: Any = self.skeleton.holding(self._gathered())
        return (copied, None) if self.adapter is None else (copied.get_base_model(), copied)

    @collective
    def _gathered(self) -> dict[str, torch.Tensor]:
        named: Any = self.model if self.adapter is None else self.adapter
        assert self.ranks is not None
        return self.ranks.gather(dict(chain(named.named_parameters(), named.named_buffers())))
