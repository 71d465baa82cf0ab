"""checkpoint: the learner's state as files. Safetensors and JSON only; weights in float32.

A policy is an ordinary Hugging Face checkpoint: the weights under the names its architecture is published
with, and every other file of the checkpoint the run started from, byte for byte.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from grpo.artifacts import checkpoint_files, is_weight_file
from grpo.errors import CorruptError
from grpo.update.adapter import holds_adapted, merged, plain_state

if TYPE_CHECKING:
    from peft import PeftModel

_SHARD_BYTES = 2**31  # with an adapter, what is merged at a time and so what a checkpoint costs in memory
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
OPTIMIZER_FILE = "optimizer.safetensors"
_DTYPES = {  # in the order in which the library writes them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Chunks = Iterable[bytes | memoryview]  # a file's content in pieces


def policy_files(
    model: PreTrainedModel, start: Path, adapter: "PeftModel | None" = None
) -> Iterator[tuple[str, Chunks]]:
    """(name, content) of each file of a checkpoint of `model`, which was loaded from a copy of `start`.

    With an adapter on it, of what the two make together; weights are merged a file at a time.
    """
    for path in checkpoint_files(start):
        if not is_weight_file(path.name):
            yield path.name, [path.read_bytes()]
    state = _published(model) if adapter is None else _published_with(adapter, model)
    split = split_torch_state_dict_into_shards(state, max_shard_size=_SHARD_BYTES)
    for name, members in split.filename_to_tensors.items():
        shard = {member: state[member] for member in members}
        shard = shard if adapter is None else dict(merged(adapter, shard))
        yield name, safetensors_file(shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        yield "model.safetensors.index.json", [json.dumps(index, indent=1, sort_keys=True).encode()]


def _published(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors under the names its architecture is published with, tied ones once."""
    own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in own}
    published: dict[str, Tensor] = revert_weight_conversion(model, state)
    return published


def _published_with(adapter: "PeftModel", model: PreTrainedModel) -> dict[str, Tensor]:
    """The same of an adapter's base, to be merged; merged where the published form splits or fuses them."""
    state: dict[str, Tensor] = revert_weight_conversion(model, plain_state(adapter))
    if not holds_adapted(adapter, state):
        state = revert_weight_conversion(model, dict(merged(adapter, plain_state(adapter))))
    return state


def optimizer_file(optimizer: torch.optim.Optimizer, model: PreTrainedModel) -> Chunks:
    """AdamW's moments as safetensors, named `<moment>.<parameter>`; empty before the first step."""
    return safetensors_file(
        {
            f"{moment}.{name}": optimizer.state[parameter][moment]
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
            for moment in _MOMENTS
        }
    )


def safetensors_file(tensors: Mapping[str, Tensor]) -> Chunks:
    """A safetensors file in pieces (github.com/huggingface/safetensors, Format).

    The library's own save() makes two copies of everything, which took longer than writing it to disk. These
    are its bytes, wide types first and by name: weights that did not change keep their digest.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    order = {name: place for place, name in enumerate(_DTYPES.values())}
    ordered = sorted(tensors.items(), key=lambda item: (order[_DTYPES[item[1].dtype]], item[0]))
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        plain = tensor.detach().cpu().contiguous()
        yield plain.flatten().view(torch.uint8).numpy().data


def load_optimizer(optimizer: torch.optim.Optimizer, model: PreTrainedModel, path: Path) -> None:
    """Put the moments of `path` into `optimizer`, in freshly allocated tensors.

    Raises CorruptError (exit 6) when they are not those of this model's parameters.
    """
    optimizer.state.clear()
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        expected = {f"{moment}.{name}" for moment in _MOMENTS for name in parameters}
        if names and names != expected:
            raise CorruptError(f"{path}: not the optimiser state of this model: see {min(names ^ expected)}")
        for name, parameter in parameters.items() if names else ():
            moments = {moment: file.get_tensor(f"{moment}.{name}") for moment in _MOMENTS}
            if moments["exp_avg"].shape != parameter.shape:
                raise CorruptError(f"{path}: exp_avg.{name} has the shape {list(moments['exp_avg'].shape)}")
            optimizer.state[parameter] = {
                moment: tensor.to(parameter.device, copy=True) for moment, tensor in moments.items()
            }
