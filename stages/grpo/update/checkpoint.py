"""checkpoint: the learner's state as files. Safetensors and JSON only; weights in float32.

A policy is an ordinary Hugging Face checkpoint: the weights under the names its architecture is published
with, and every other file of the checkpoint the run started from, byte for byte.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from grpo.artifacts import checkpoint_files, is_weight_file
from grpo.errors import CorruptError
from grpo.models.weights import merged, published_state
from grpo.update.optimizer import names_of, state_of, tensors_of

_SHARD_BYTES = 2**31  # with an adapter, what is merged at a time and so what a checkpoint costs in memory
OPTIMIZER_FILE = "optimizer.safetensors"
Chunks = Iterable[bytes | memoryview]  # a file's content in pieces


def copy_to(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A copy of `tensor` where `parameter` is."""
    return tensor.to(parameter.device, copy=True)


def policy_files(model: PreTrainedModel, start: Path) -> Iterator[tuple[str, Chunks]]:
    """(name, content) of each file of a checkpoint of `model`, which was loaded from a copy of `start`.

    With an adapter in it, of what the two make together; weights are merged a file at a time.
    """
    for path in checkpoint_files(start):
        if not is_weight_file(path.name):
            yield path.name, [path.read_bytes()]
    state = published_state(model)
    split = split_torch_state_dict_into_shards(state, max_shard_size=_SHARD_BYTES)
    for name, members in split.filename_to_tensors.items():
        shard = {member: state[member] for member in members}
        yield name, safetensors_file(dict(merged(model, shard)))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        yield "model.safetensors.index.json", [json.dumps(index, indent=1, sort_keys=True).encode()]


def moments_of(optimizer: torch.optim.Optimizer, model: PreTrainedModel) -> dict[str, Tensor]:
    """AdamW's moments, named `<moment>.<parameter>`; none before the first step. No copies."""
    return {
        f"{moment}.{name}": tensor
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment, tensor in tensors_of(optimizer.state[parameter]).items()
    }


def safetensors_file(tensors: Mapping[str, Tensor]) -> Chunks:
    """A safetensors file in pieces (github.com/huggingface/safetensors, Format), with the library's bytes.

    Its own save() makes two copies of everything, which took longer than writing it to disk: it is asked for
    the header of empty tensors alone, whose order and types are those of the full ones.
    """
    # Eagerly: what is on a GPU may move before the pieces are asked for. On a CPU nothing is copied.
    return _pieces({name: tensor.detach().cpu() for name, tensor in tensors.items()})


def _pieces(tensors: Mapping[str, Tensor]) -> Chunks:
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    header: dict[str, Any] = json.loads(save(empty, metadata={"format": "pt"})[8:])
    names, end = list(header)[1:], 0  # the first is __metadata__
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield tensors[name].contiguous().flatten().view(torch.uint8).numpy().data


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: PreTrainedModel,
    path: Path,
    placed: Callable[[Tensor, Tensor], Tensor] = copy_to,
) -> None:
    """Put the moments of `path` into `optimizer`, in freshly allocated tensors.

    placed: makes such a tensor of a whole one, for a parameter. Raises CorruptError (exit 6) when they are
    not those of this model's parameters.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        held = {name: names_of(optimizer, name, names) for name in parameters}
        expected = {f"{moment}.{name}" for name, moments in held.items() for moment in moments}
        if names and names != expected:
            raise CorruptError(f"{path}: not the optimiser state of this model: see {min(names ^ expected)}")
        for name, parameter in parameters.items() if names else ():
            moments = {moment: file.get_tensor(f"{moment}.{name}") for moment in held[name]}
            first = held[name][1]
            if moments[first].shape != parameter.shape:
                raise CorruptError(f"{path}: {first}.{name} has the shape {list(moments[first].shape)}")
            copies = {moment: placed(tensor, parameter) for moment, tensor in moments.items()}
            optimizer.state[parameter] = state_of(optimizer, copies)
