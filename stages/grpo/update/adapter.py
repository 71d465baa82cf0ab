"""adapter: a LoRA adapter in training on a frozen base. What the two make together: models/weights.py.

Shapes: R rank, I and O the features a linear module takes and gives.
"""

import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grpo.config import LoraConfig
from grpo.errors import CorruptError, InputError, UsageError
from grpo.models.loading import load_skeleton
from grpo.models.weights import ADAPTER_NAME, adapted_layers
from grpo.update.checkpoint import safetensors_file
from grpo.update.optimizer import quiet

if TYPE_CHECKING:
    from peft import PeftModel

Put = Callable[[Tensor, Tensor], object]
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Other values make another policy of the same tensors.
_FIXED = ("r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save")


def add_adapter(model: PreTrainedModel, lora: LoraConfig, seed: int) -> "PeftModel":
    """A trainable adapter on `model`: W + scale B A for each targeted weight W (arXiv 2106.09685).

    Layers of `model` are replaced in place: it computes with the adapter however it is called. All is in eval
    mode and frozen, but A_RI, B_OR and what trains whole. Raises UsageError (exit 2) without peft and
    for a target or module not to be had.
    """
    require_peft()
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    whole = _whole(model, lora.modules_to_save)
    modules = _targeted(model, lora.targets, whole)
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=list(modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
        task_type="CAUSAL_LM",
    )
    # peft draws too; and it warns of how it calls transformers, which no user can change.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"), quiet():
        try:
            adapter: PeftModel = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
        except ValueError as error:
            raise UsageError(f"update.lora: peft refuses this model: {error}") from error
    if others := sorted(modules.keys() - adapted_layers(model).keys()):
        # In some mixtures of experts peft takes the names of a dense layer for those of the fused experts.
        message = f"update.lora.targets: peft would adapt the fused experts in place of {others[0]}"
        raise UsageError(f"{message}; name only modules that no expert has, such as q_proj")
    assert adapted_layers(model).keys() == modules.keys()
    if whole:  # not told before: peft would train copies, which are in the way of whoever reads the head
        config.modules_to_save = list(whole)
        for module in whole.values():
            module.requires_grad_(True)
    reset_adapter(model, seed)
    return adapter.eval()


def require_peft() -> None:
    """Raise UsageError (exit 2) where peft cannot be imported."""
    try:
        with quiet():
            importlib.import_module("peft")
    except ImportError as error:
        message = f"update.lora: peft cannot be imported: {error}"
        raise UsageError(f"{message}; pip install 'grpo-stages[lora]'") from error


def check_modules(checkpoint: Path, lora: LoraConfig) -> None:
    """Raise UsageError (exit 2) as add_adapter would for a module; reads the configuration, no weights."""
    model = load_skeleton(checkpoint)
    _targeted(model, lora.targets, _whole(model, lora.modules_to_save))


@torch.no_grad()
def reset_adapter(model: PreTrainedModel, seed: int, put: Put = Tensor.copy_) -> None:
    """Start again: A as a linear layer's weight, from `seed` alone; B zero, so that nothing changes.

    Modules that train whole stay as they are. put: copies a whole tensor into one of the model.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        A_RI, B_OR = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        drawn_RI = torch.empty(A_RI.shape)  # in main memory: the same on every device
        put(A_RI, nn.init.kaiming_uniform_(drawn_RI, a=math.sqrt(5), generator=generator))
        B_OR.zero_()


def adapter_files(model: "PeftModel") -> Iterator[tuple[str, bytes]]:
    """(name, content) of the adapter's files as peft writes them, without the path of the base."""
    yield CONFIG_FILE, adapter_config(model)
    yield WEIGHTS_FILE, b"".join(safetensors_file(adapter_weights(model)))


def adapter_config(model: "PeftModel") -> bytes:
    """The content of CONFIG_FILE: the same on every machine, in every process."""
    return json.dumps(_config(model), indent=2, sort_keys=True).encode()


def adapter_weights(model: "PeftModel") -> dict[str, Tensor]:
    """The adapter's own tensors and those that train whole, under peft's names on disk; no copies."""
    from peft import get_peft_model_state_dict

    # Without the False, peft looks for the base's configuration on disk and on the hub.
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = dict.fromkeys(model.peft_config[ADAPTER_NAME].modules_to_save or ())
    named = model.get_base_model().named_parameters(remove_duplicate=False)
    return weights | {f"base_model.model.{name}": p.data for name, p in named if _within(name, whole)}


@torch.no_grad()
def load_adapter(model: "PeftModel", folder: Path, put: Put = Tensor.copy_) -> None:
    """Put the weights of adapter_files() in `folder` into the adapter, in place and bit for bit.

    put: as for reset_adapter(). Raises InputError (exit 4) when its rank, scale or modules are not the
    configured ones, CorruptError (exit 6) when its weights are not those of this adapter; the adapter is then
    as it was.
    """
    path, weights = folder / WEIGHTS_FILE, adapter_weights(model)
    saved, config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")), _config(model)
    for name in _FIXED:
        if saved[name] != config[name]:
            message = f"{folder / CONFIG_FILE}: {name} is {saved[name]}; update.lora asks for {config[name]}"
            raise InputError(f"{message}; they are fixed for a run")
    tensors = load_file(path)
    if names := tensors.keys() ^ weights.keys():
        raise CorruptError(f"{path}: not the weights of this adapter: see {min(names)}")
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (weights[name].shape, weights[name].dtype):
            raise CorruptError(f"{path}: {name} is {tensor.dtype} of the shape {list(tensor.shape)}")
    for name, tensor in tensors.items():
        put(weights[name], tensor)


def _targeted(
    model: PreTrainedModel, targets: Sequence[str] | None, whole: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Linear modules by name, none of `whole`. Nor the output head: log-probs are of its weight alone."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not _within(name, whole)
    }
    exist = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
    found = dict(linear) if targets is None else {}
    for target in targets or ():
        matching = {name: module for name, module in linear.items() if f".{name}".endswith(f".{target}")}
        if not matching:
            message = f"update.lora.targets: {target!r} is not a linear module that can take an adapter"
            raise UsageError(f"{message}; of this model these can: {exist}")
        found |= matching
    if not found:
        raise UsageError(f"update.lora.targets: nothing is targeted; of this model these can be: {exist}")
    _check_not_shared(model, found)
    return found


def _whole(model: PreTrainedModel, names: Sequence[str]) -> dict[str, nn.Module]:
    """Modules that train whole, by their full names. Raises UsageError (exit 2) for one that cannot.

    A weight used elsewhere too would change there: whoever shares it has to be named as well.
    """
    every = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters())}
    found: dict[str, nn.Module] = {}
    for wanted in names:
        matching = {name: module for name, module in every.items() if f".{name}".endswith(f".{wanted}")}
        if not matching:
            exist = ", ".join(sorted({name.rpartition(".")[2] for name in every} - {""}))
            message = f"update.lora.modules_to_save: {wanted!r} names no module with weights"
            raise UsageError(f"{message}; of this model these are: {exist}")
        found |= matching
    inside = {id(parameter) for module in found.values() for parameter in module.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in inside and not _within(name, found):
            owner = name.rpartition(".")[0]
            message = f"update.lora.modules_to_save: {owner} has a weight of {', '.join(found)} too"
            raise UsageError(f"{message}, which would change there; name {owner} as well")
    return found


def _within(name: str, modules: Mapping[str, object]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _check_not_shared(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> None:
    """One weight used in two places would have to be two after merging."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and {name.rpartition(".")[0], other.rpartition(".")[0]} & modules.keys():
            message = f"update.lora.targets: {other} and {name} are one weight"
            raise UsageError(f"{message}, which cannot take an adapter; name other targets")


def _config(model: "PeftModel") -> dict[str, Any]:
    config = model.peft_config[ADAPTER_NAME].to_dict()
    config |= {"base_model_name_or_path": None, "inference_mode": True}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
