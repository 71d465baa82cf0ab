"""checkpoint: the learner's state as files. Safetensors and JSON only; weights in float32.

A policy is an ordinary Hugging Face checkpoint: the weights under the names its architecture is published
with, and every other file of the checkpoint the run started from, byte for byte.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from grpo.artifacts import checkpoint_files, is_weight_file
from grpo.errors import CorruptError
from grpo.models.weights import merged, published_state
from grpo.update.optimizer import names_of, state_of, tensors_of

FILE_BYTES = 2**31  # of tensors in a file; with an adapter, what is merged at a time
WEIGHTS, MOMENTS = "model", "optimizer"  # what files of them are called
INDEX_FILE = "model.safetensors.index.json"
Chunks = Iterable[bytes | memoryview]  # a file's content in pieces


def copy_to(stored: Any, parameter: Tensor) -> Tensor:
    """A copy of what a file has of a tensor, where `parameter` is."""
    copied: Tensor = stored[...].to(parameter.device, copy=True)
    return copied


def policy_files(model: PreTrainedModel, start: Path) -> Iterator[tuple[str, Chunks]]:
    """(name, content) of each file of a checkpoint of `model`, which was loaded from a copy of `start`.

    With an adapter in it, of what the two make together; weights are merged a file at a time.
    """
    state = published_state(model)
    files = cut(state, WEIGHTS)
    for name, content in plain_files(start, state, files):
        yield name, [content]
    for name, members in files.items():
        shard = {member: state[member] for member in members}
        yield name, safetensors_file(dict(merged(model, shard)))


def plain_files(
    start: Path, state: Mapping[str, Tensor], files: Mapping[str, Iterable[str]]
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each that has no weights; `state` is in `files`, as cut() has it."""
    for path in checkpoint_files(start):
        if not is_weight_file(path.name):
            yield path.name, path.read_bytes()
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        places = {member: name for name, members in files.items() for member in members}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        yield INDEX_FILE, json.dumps(index, indent=1, sort_keys=True).encode()


def cut(state: Mapping[str, Tensor], name: str, file_bytes: int = FILE_BYTES) -> dict[str, list[str]]:
    """Names of files -> names of the tensors in each, from names and sizes alone: `state` may be empty ones.

    One file, `<name>.safetensors`, where `file_bytes` hold all of it; at least one.
    """
    split = split_state_dict_into_shards_factory(
        dict(state),
        max_shard_size=file_bytes,
        filename_pattern=f"{name}{{suffix}}.safetensors",
        get_storage_size=lambda tensor: tensor.nbytes,
    )
    return split.filename_to_tensors or {f"{name}.safetensors": []}


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
    folder: Path,
    placed: Callable[[Any, Tensor], Tensor] = copy_to,
) -> None:
    """Put the moments that the files in `folder` hold into `optimizer`, in freshly allocated tensors.

    placed: makes such a tensor of what a file has of it, for a parameter. Raises CorruptError (exit 6) when
    they are not those of this model's parameters.
    """
    with ExitStack() as stack:
        paths = sorted(folder.glob(f"{MOMENTS}*.safetensors"))
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        names = set(where)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        held = {name: names_of(optimizer, name, names) for name in parameters}
        expected = {f"{moment}.{name}" for name, moments in held.items() for moment in moments}
        if not paths or (names and names != expected):
            see = f": see {min(names ^ expected)}" if paths else ""
            raise CorruptError(f"{folder}: not the optimiser state of this model{see}")
        for name, parameter in parameters.items() if names else ():
            whole = {f"{moment}.{name}": moment for moment in held[name]}
            moments = {moment: where[key].get_slice(key) for key, moment in whole.items()}
            first = held[name][1]
            if (shape := moments[first].get_shape()) != [*parameter.shape]:
                raise CorruptError(f"{folder}: {first}.{name} has the shape {shape}")
            copies = {moment: placed(stored, parameter) for moment, stored in moments.items()}
            optimizer.state[parameter] = state_of(optimizer, copies)
