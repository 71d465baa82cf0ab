"""bounds: no model is built that is much larger than the weights it is built for.

A configuration is a few numbers, and each of them may ask for more memory than the machine has: so what is
registered while a model is built, on the meta device, is counted against the headers of its weights.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from grpo.artifacts import read_json
from grpo.errors import CorruptError, InputError

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
# A tied matrix is registered up to three times, and a few numbers are in no file.
_TIMES, _SPARE_NUMBERS = 4, 2**20
_BUFFER_NUMBERS = 2**28  # 1 GiB of float32: causal masks of old models are the largest
_MODULES_PER_WEIGHT, _SPARE_MODULES = 64, 1024
_MOST = {"layer": 4096, "labels": 2**16}  # some configurations make a list as long as that
_MOST_BITS = 63  # of a number that torch takes as a size
# The largest known are of 33 MiB (a tokenizer) and 10 MiB (an index of weights): what is larger takes minutes
# and GiB to be read, whatever it says.
_MOST_MIB = {"tokenizer.json": 64, "model.safetensors.index.json": 64, "vocab.json": 64}
_MOST_MIB_OF_OTHERS, _TEXT_FILES = 16, {".json", ".jinja", ".txt"}
_MOST_MIB |= {"config.json": 4, "generation_config.json": 4}


def weight_files(checkpoint: Path) -> list[Path]:
    """What transformers reads. Raises InputError where a file is missing, CorruptError for no index."""
    first = next((name for name in WEIGHT_FILES if (checkpoint / name).is_file()), None)
    if first is None:
        wanted = " or ".join(WEIGHT_FILES)
        raise InputError(f"{checkpoint}: has no {wanted}; weights cannot be loaded without")
    names = {first}
    if first.endswith(".json"):
        names = set(map(str, read_json(checkpoint / first, weight_map=dict)["weight_map"].values()))
    for path in sorted(checkpoint / name for name in names):
        if path.parent != checkpoint:
            raise CorruptError(f"{checkpoint / first}: lists {path.name!r} of another folder")
        if not path.is_file():
            raise InputError(f"{path}: missing, though the index of the checkpoint lists it")
    return sorted(checkpoint / name for name in names)


def check_kinds(checkpoint: Path, names: set[str]) -> None:
    """Raise CorruptError where weights of these names are stored as other than real numbers.

    transformers would take whole numbers as they are, and of complex ones the real part.
    """
    for path in weight_files(checkpoint):
        with safe_open(path, framework="numpy") as file:
            for name in names.intersection(file.keys()):
                if not (kind := file.get_slice(name).get_dtype()).startswith(("F", "BF")):
                    raise CorruptError(f"{path}: weight {name} is stored as {kind}; real numbers are right")


def check_weights(checkpoint: Path, model: nn.Module) -> None:
    """Raise InputError for weights that are not float32, CorruptError for one that is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            found = f"weight {name} is {parameter.dtype}"
            raise InputError(f"{checkpoint}: {found}; only what is not quantised can be used")
        check_finite(checkpoint, name, parameter)


def check_finite(checkpoint: Path, name: str, weight: Tensor) -> None:
    """Raise CorruptError where a weight, or a part of it, holds NaN or infinity."""
    # aminmax lets NaN through to both and makes no copy.
    if weight.numel() and not all(bool(end.isfinite()) for end in weight.detach().aminmax()):
        raise CorruptError(f"{checkpoint}: weight {name} holds NaN or infinity; every weight must be finite")


def shapes_in(path: Path) -> list[tuple[int, ...]]:
    """The shapes in the header of a file of weights. Raises SafetensorError."""
    with safe_open(path, framework="numpy") as file:
        return [tuple(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118 - no mapping


def check_counts(path: Path, values: Any) -> None:
    """Raise CorruptError for a number in `values`, the content of `path`, that no model has."""
    stack = [values]
    while stack:
        section = stack.pop()
        for key, value in section.items() if isinstance(section, dict) else ():
            stack.append(value)
            if not isinstance(value, int):
                continue
            for most in (most for word, most in _MOST.items() if word in key and value > most):
                raise CorruptError(f"{path}: {key} is {value}; at most {most} can be right")
            if value.bit_length() > _MOST_BITS:
                raise CorruptError(f"{path}: {key} has {value.bit_length()} bits; no size is of more than 63")


def check_sizes(checkpoint: Path) -> None:
    """Raise CorruptError for a file of text that is larger than that of any model, before it is read."""
    for path in sorted(checkpoint.iterdir()):
        most = _MOST_MIB.get(path.name, _MOST_MIB_OF_OTHERS)
        if path.suffix in _TEXT_FILES and path.is_file() and path.stat().st_size > most * 2**20:
            found = f"{path.stat().st_size / 2**20:,.0f} MiB"
            raise CorruptError(f"{path}: has {found}; at most {most} can be right")


@contextmanager
def bounded(checkpoint: Path) -> Iterator[None]:
    """Within, CorruptError for a model that asks for far more than the weights of `checkpoint` are."""
    shapes = [shape for path in weight_files(checkpoint) for shape in shapes_in(path)]
    stored = sum(map(math.prod, shapes))
    left = {
        "weights": _TIMES * stored + _SPARE_NUMBERS,
        "buffers": stored + _BUFFER_NUMBERS,
        "modules": _MODULES_PER_WEIGHT * len(shapes) + _SPARE_MODULES,
    }

    def take(what: str, amount: int, name: str) -> None:
        left[what] -= amount
        if left[what] < 0:
            found = f"config.json asks for far more {what} ({name}) than its files are for"
            raise CorruptError(f"{checkpoint}: {found}: {len(shapes)} weights of {stored:,} numbers")

    def numbers(what: str) -> Any:
        def count(module: Any, name: str, tensor: Tensor | None) -> None:
            if tensor is not None and tensor.is_meta:  # else it is there already
                take(what, tensor.numel(), f"{type(module).__name__}.{name} {list(tensor.shape)}")

        return count

    def modules(module: Any, name: str, added: Any) -> None:
        take("modules", 1, f"{type(module).__name__}.{name}")

    hooks = [
        torch_module.register_module_parameter_registration_hook(numbers("weights")),
        torch_module.register_module_buffer_registration_hook(numbers("buffers")),
        torch_module.register_module_module_registration_hook(modules),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
