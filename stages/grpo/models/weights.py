"""weights: those of a policy in memory, as whoever computes with them wants them: own or published names.

An adapter is never merged in place: what is added to a weight and taken away again leaves another weight
behind, in bfloat16 soon a visible one (trl#6688). Every merged weight is a fresh tensor.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.artifacts import IN_MEMORY, checkpoint_files, files, is_weight_file
from grpo.errors import ResourceError

ADAPTER_NAME = "default"  # what peft calls an adapter without a name


@dataclass(frozen=True)
class Weights:
    """A policy in memory. Whoever trains it changes these weights: they are to be taken before that.

    model: with or without a LoRA adapter in it. folder: the checkpoint that it started from, whose
    configuration, tokenizer and ends of a response it has.
    """

    model: PreTrainedModel
    folder: Path

    @property
    def plain(self) -> PreTrainedModel | None:
        """The model itself; None where an adapter is in it."""
        return None if adapted_layers(self.model) else self.model

    def own(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as the model without an adapter has them, one at a time; copies where merged."""
        return merged(self.model, plain_state(self.model))

    def published(self) -> Iterator[tuple[str, Tensor]]:
        """The same as a checkpoint of its architecture has them."""
        return merged(self.model, published_state(self.model))

    @contextmanager
    def written(self, below: Path | None = None, prefix: str = "grpo-") -> Iterator[Path]:
        """A checkpoint of them, for another process: in memory where there is room, gone afterwards.

        below: a folder for it, which other machines see too. prefix: of its name.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.published()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if below is None and IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > size:
            below = IN_MEMORY
        with tempfile.TemporaryDirectory(dir=below, prefix=prefix) as name:
            folder = Path(name)
            with files.resource_errors(folder):
                for path in checkpoint_files(self.folder):
                    if not is_weight_file(path.name):
                        shutil.copyfile(path, folder / path.name)
            try:
                save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            except SafetensorError as error:  # of writing; it has no errno
                raise ResourceError(f"{folder}: {error}; {files.free_space(folder)}") from error
            del tensors
            yield folder


Lend = Callable[[int], AbstractContextManager[Path | Weights]]
"""The policy of a number, for the while: the folder of its checkpoint, or its weights in memory."""


def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the names of the model without an adapter, tied ones once; no copies."""
    own, layers = dict(chain(model.named_parameters(), model.named_buffers())), adapted_layers(model)
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, rest = name.rpartition(".base_layer.")
        if layer in layers:
            state[f"{layer}.{rest}"] = tensor
        elif name in own and name.rpartition(".lora_")[0] not in layers:
            state[name] = tensor
    return state


def published_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The same under the names of a checkpoint of its architecture; merged() gives what an adapter adds.

    No copies, but where the published form splits or fuses weights that have an adapter: merged already.
    """
    state = published_form(model, plain_state(model))
    if not holds_adapted(model, state):
        state = published_form(model, dict(merged(model, plain_state(model))))
    return state


def published_form(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What tensors of plain_state() are on disk, of which `state` has all of a layer or none; no copies."""
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return found


@torch.no_grad()
def merged(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`state` one by one, each weight of the base that has an adapter as a fresh tensor W + scale B A.

    `state` holds tensors of plain_state() under any names; others pass as they are.
    """
    layers = {_address(layer.get_base_layer().weight): layer for layer in adapted_layers(model).values()}
    for name, tensor in state.items():
        layer = layers.get(_address(tensor))
        yield name, tensor if layer is None else tensor + layer.get_delta_weight(ADAPTER_NAME)


def holds_adapted(model: PreTrainedModel, state: Mapping[str, Tensor]) -> bool:
    """Whether every weight that has an adapter is in `state`, itself and whole, so that merged() finds it."""
    found = {_address(tensor) for tensor in state.values()}
    return all(_address(layer.get_base_layer().weight) in found for layer in adapted_layers(model).values())


def by_layer(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of `state` by decoder layer, and those of none."""
    within = [
        f"{name}." for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    by_layer: dict[str, list[str]] = {}
    for name in state:
        layer = next((prefix for prefix in within if name.startswith(prefix)), "")
        by_layer.setdefault(layer, []).append(name)
    yield from by_layer.values()


def adapted_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Layers with an adapter, by their names in the base and in its order; peft may not be there."""
    return {name: each for name, each in model.named_modules() if hasattr(each, "lora_A")}


def _address(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape
