"""loading: a Hugging Face checkpoint -> a causal language model, its tokenizer, what ends a response.

Code that came with a checkpoint never runs, and pickled weights are never read.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from grpo.artifacts import read_json
from grpo.errors import CorruptError, InputError

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_NO_MODEL = "cannot be loaded as a causal language model"


def load_model(checkpoint: Path, device: str) -> PreTrainedModel:
    """The causal language model of `checkpoint` in float32, sdpa attention and eval mode, on `device`.

    Raises InputError where something is missing or unsupported, CorruptError where weights are missing,
    have the wrong shape, or are not finite.
    """
    model = _read_model(checkpoint)
    for tensor in _tensors(model).values():
        tensor.data = _copied(tensor.data, device)
    return model


@torch.no_grad()
def copy_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Have `model` compute, bit for bit, what load_model(checkpoint) would, of the same architecture.

    Nothing is copied when the checkpoint is refused, by load_model or because its tensors are others.
    """
    source, target = _tensors(_read_model(checkpoint)), _tensors(model)
    if differing := sorted(name for name, _ in _kinds(source).items() ^ _kinds(target).items()):
        message = f"weight {differing[0]} differs in shape or tying from the model in memory"
        raise InputError(f"{checkpoint}: {message}; both must have the same architecture")
    for name, tensor in target.items():
        tensor.copy_(source[name])


class Blueprint:
    """The modules of a model as they were built: of the next policy they are copied.

    Building them is most of what load_model takes for a small model.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Path) -> None:
        """Of `model`, just loaded from `checkpoint`: nothing has been computed with it yet."""
        empty = {id(weight): torch.nn.Parameter(weight.detach().to("meta")) for weight in model.parameters()}
        self._model = copy.deepcopy(model, memo=empty)
        self._config = (checkpoint / "config.json").read_bytes()

    def load_model(self, checkpoint: Path, device: str) -> PreTrainedModel | None:
        """load_model(), bit for bit; None where the checkpoint is not of this model. Raises CorruptError."""
        own, found = dict(self._model.named_parameters()), {}
        with suppress(OSError, SafetensorError):  # load_model says what it is
            if (checkpoint / "config.json").read_bytes() == self._config:
                found = load_file(checkpoint / WEIGHT_FILES[0])
        if _kinds(found) != _kinds(own):
            return None
        fresh = {id(own[name]): torch.nn.Parameter(_copied(found[name], device)) for name in own}
        model = copy.deepcopy(self._model, memo=fresh)
        _check_weights(checkpoint, model)
        return model


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `checkpoint`, chat template included. Raises InputError."""
    _require_file(checkpoint, TOKENIZER_FILES, "a tokenizer")
    with _refusals(checkpoint, "its tokenizer cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(checkpoint), local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def load_config(checkpoint: Path) -> PreTrainedConfig:
    """The configuration of `checkpoint`, without its weights. Raises InputError, CorruptError."""
    _require_file(checkpoint, ("config.json",), "a model")
    read_json(checkpoint / "config.json")  # transformers' own message does not say what is wrong in it
    with _refusals(checkpoint, "its configuration cannot be used"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(checkpoint), local_files_only=True)
    return config


def load_skeleton(checkpoint: Path) -> PreTrainedModel:
    """The modules of the causal language model of `checkpoint`, without weights or memory for them."""
    auto: Any = AutoModelForCausalLM
    config = load_config(checkpoint)
    with _refusals(checkpoint, _NO_MODEL), torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    return model


def eos_token_ids(checkpoint: Path) -> frozenset[int]:
    """Ids that end a response: those of generation_config.json, else the configuration's and the tokenizer's.

    A chat model often has several, and the tokenizer knows only one of them. Empty: nothing ends a response.
    """
    if ids := _eos_of(checkpoint / "generation_config.json"):
        return ids
    ids = _eos_of(checkpoint / "config.json")
    if any((checkpoint / name).is_file() for name in TOKENIZER_FILES):
        own = load_tokenizer(checkpoint).eos_token_id
        ids |= frozenset() if own is None else {own}
    return ids


def context_length(config: PreTrainedConfig) -> int | None:
    """The most positions the model was made for, prompt and response together; None where it does not say."""
    length: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length


def best_device() -> str:
    """`cuda` where a GPU is there, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or load reports on stderr: what matters in them is raised."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _read_model(checkpoint: Path) -> PreTrainedModel:
    load_config(checkpoint)
    _require_file(checkpoint, WEIGHT_FILES, "weights")
    with _refusals(checkpoint, _NO_MODEL):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(checkpoint),
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below, in one line
                output_loading_info=True,
            )
        except (SafetensorError, RuntimeError) as error:
            raise CorruptError(f"{checkpoint}: its weights cannot be read: {_one_line(error)}") from error
    model: PreTrainedModel
    model, report = loaded
    for name, found, right in sorted(report["mismatched_keys"]):
        message = f"weight {name} has shape {list(found)}; config.json asks for {list(right)}"
        raise CorruptError(f"{checkpoint}: {message}")
    for problem in ("missing", "unexpected"):
        if names := sorted(report[f"{problem}_keys"]):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            message = f"{problem} weight {names[0]}{more}; the weights must be exactly those of config.json"
            raise CorruptError(f"{checkpoint}: {message}")
    _check_weights(checkpoint, model)
    return model


@contextmanager
def _refusals(checkpoint: Path, message: str) -> Iterator[None]:
    """transformers without a word of its own: what it raises is an InputError of one line."""
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, ImportError, KeyError, TypeError, StrictDataclassError) as error:
        raise InputError(f"{checkpoint}: {message}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return shorten(str(error) or type(error).__name__, width=300, placeholder=" ...")


def _check_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        where = f"{checkpoint}: weight {name}"
        if parameter.dtype != torch.float32:
            raise InputError(f"{where} is {parameter.dtype}; only what is not quantised can be used")
        # aminmax lets NaN through to both and makes no copy.
        if parameter.numel() and not all(bool(end.isfinite()) for end in parameter.detach().aminmax()):
            raise CorruptError(f"{where} holds NaN or infinity; every weight must be finite")


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    # Tied weights are one parameter and come once. Buffers too: some rotary embeddings change theirs.
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _copied(tensor: Tensor, device: str) -> Tensor:
    """In freshly allocated memory: transformers leaves float32 weights mapped to the file, at addresses that
    are not aligned, where CPU kernels may round differently, and where a file that changes changes the model.
    """
    return tensor.to(device, copy=True, memory_format=torch.contiguous_format)


def _eos_of(path: Path) -> frozenset[int]:
    config = read_json(path) if path.is_file() else {}
    ids = config.get("eos_token_id")
    if ids is None:  # a model of several parts keeps the language model's in a part
        ids = config.get("text_config", {}).get("eos_token_id")
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _require_file(checkpoint: Path, names: tuple[str, ...], what: str) -> None:
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such directory; a Hugging Face checkpoint directory is needed")
    if not any((checkpoint / name).is_file() for name in names):
        raise InputError(f"{checkpoint}: has no {' or '.join(names)}; {what} cannot be loaded without")
