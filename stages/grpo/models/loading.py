"""loading: a Hugging Face checkpoint -> a causal language model, its tokenizer, what ends a response.

Code that came with a checkpoint never runs, and pickled weights are never read.
"""

import copy
import operator
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
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

from grpo.artifacts import read_json, require_checkpoint
from grpo.errors import CorruptError, InputError
from grpo.models.attention import choose_attention, exact_products, is_causal
from grpo.models.bounds import WEIGHT_FILES, bounded, check_counts, check_kinds, check_sizes, check_weights
from grpo.models.families import check_family
from grpo.models.refusals import refusals
from grpo.models.tokenizer import check_growth

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
NO_MODEL = "cannot be loaded as a causal language model"


def load_model(checkpoint: Path, device: str, attention: str = "auto") -> PreTrainedModel:
    """The causal language model of `checkpoint` in float32 and eval mode, on `device`.

    attention: model_options.attn_implementation; see choose_attention. Raises InputError where something is
    missing or unsupported, CorruptError where weights are missing, have the wrong shape, or are not finite.
    """
    model = _read_model(checkpoint, attention)
    for tensor in _tensors(model).values():
        tensor.data = _copied(tensor.data, device)
    settle_attention(model, checkpoint, attention)
    return model


def settle_attention(model: PreTrainedModel, checkpoint: Path, attention: str) -> None:
    """Leave a model that was loaded with sdpa in the attention that computes it. Raises as load_model."""
    with refusals(str(checkpoint), "its model computes nothing"):
        choose_attention(model, attention)
        causal = is_causal(model)
    if not causal:
        raise InputError(f"{checkpoint}: {NO_MODEL}: its tokens see later ones")


@torch.no_grad()
def copy_weights(
    model: PreTrainedModel, checkpoint: Path, put: Callable[[Tensor, Tensor], object] = Tensor.copy_
) -> None:
    """Have `model` compute, bit for bit, what load_model(checkpoint) would, of the same architecture.

    Where its tensors are of a narrower type, what that would after rounding to it. put: copies a whole tensor
    into one of the model.

    Nothing is copied when the checkpoint is refused, by load_model or because its tensors are others.
    """
    read = _read_model(checkpoint, model.config._attn_implementation)
    check_like(model, read, checkpoint)
    source = _tensors(read)
    for name, tensor in _tensors(model).items():
        put(tensor, source[name])


def check_like(model: PreTrainedModel, other: PreTrainedModel, checkpoint: Path) -> None:
    """Raise InputError where `other`, that of `checkpoint`, is of another architecture."""
    shapes = ({(name, tensor.shape) for name, tensor in _tensors(each).items()} for each in (other, model))
    if differing := sorted(name for name, _ in operator.xor(*shapes)):
        message = f"weight {differing[0]} differs in shape or tying from the model in memory"
        raise InputError(f"{checkpoint}: {message}; both must have the same architecture")


class Blueprint:
    """The modules of a model as they were built: of the next policy they are copied.

    Building them is most of what load_model takes for a small model.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Path) -> None:
        """Of `model`, a plain one that was loaded from `checkpoint`."""
        empty = {id(weight): torch.nn.Parameter(weight.detach().to("meta")) for weight in model.parameters()}
        self._model = copy.deepcopy(model, memo=empty)
        # Layers whose gradients are checkpointed are in training, and would keep no cache.
        torch.nn.Module.eval(self._model)
        self._config = (checkpoint / "config.json").read_bytes()

    def is_of(self, checkpoint: Path) -> bool:
        """Whether `checkpoint` has the configuration that these modules were built from."""
        with suppress(OSError):  # load_model says what it is
            return (checkpoint / "config.json").read_bytes() == self._config
        return False

    def load_model(self, checkpoint: Path, device: str) -> PreTrainedModel | None:
        """load_model(), bit for bit; None where the checkpoint is not of this model. Raises CorruptError."""
        found: dict[str, Tensor] = {}
        with suppress(OSError, SafetensorError):
            if self.is_of(checkpoint):
                found = load_file(checkpoint / WEIGHT_FILES[0])
        if _kinds(found) != _kinds(dict(self._model.named_parameters())):
            return None
        model = self.holding({name: _copied(tensor, device) for name, tensor in found.items()})
        check_weights(checkpoint, model)
        return model

    @torch.no_grad()
    def holding(self, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
        """The model with these very tensors as its parameters, by name; buffers among them are copied."""
        own = self._model.named_parameters()
        model = copy.deepcopy(
            self._model, memo={id(empty): torch.nn.Parameter(tensors[name]) for name, empty in own}
        )
        for name, buffer in model.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])
        return model


def has_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the parameters of `model` are these very tensors, by name, and it has no buffers among them."""
    own = dict(model.named_parameters())
    return tensors.keys() == own.keys() and all(
        tensor.data_ptr() == own[name].data_ptr() and tensor.shape == own[name].shape
        for name, tensor in tensors.items()
    )


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `checkpoint`, chat template included. Raises InputError."""
    _require_file(checkpoint, TOKENIZER_FILES, "a tokenizer")
    check_sizes(checkpoint)
    with refusals(str(checkpoint), "its tokenizer cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(checkpoint), local_files_only=True, trust_remote_code=False
        )
        if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            check_growth(checkpoint, fast)
        int(tokenizer.model_max_length)
        tokenizer("0")  # some fail with every text
    return tokenizer


def load_config(checkpoint: Path) -> PreTrainedConfig:
    """The configuration of `checkpoint`, without its weights. Raises InputError, CorruptError."""
    _require_file(checkpoint, ("config.json",), "a model")
    with refusals(str(checkpoint), "its configuration cannot be used"):
        return read_config(checkpoint)


def read_config(checkpoint: Path) -> PreTrainedConfig:
    """The same; raises whatever transformers does."""
    path = checkpoint / "config.json"
    check_sizes(checkpoint)
    check_counts(path, read_json(path))  # transformers' own messages do not say what is wrong in it
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        str(checkpoint), local_files_only=True, trust_remote_code=False
    )
    return config


def check_model(checkpoint: Path, attention: str = "auto") -> PreTrainedConfig:
    """The configuration of a causal language model that can be trained here, as far as it says.

    Raises InputError, CorruptError.
    """
    config = load_config(checkpoint)
    known = AutoModelForCausalLM._model_mapping
    model_class = known.get(type(config), None)
    check_family(checkpoint, config, model_class, attention)
    return config


def load_skeleton(checkpoint: Path) -> PreTrainedModel:
    """The modules of the causal language model of `checkpoint`, without weights or memory for them."""
    auto: Any = AutoModelForCausalLM
    config = load_config(checkpoint)
    with refusals(str(checkpoint), NO_MODEL), bounded(checkpoint), torch.device("meta"):
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


def load_pretrained(auto_class: Any, checkpoint: Path, attention: str, **options: Any) -> Any:
    """(model, report) of transformers' `auto_class`, in float32: with no code that came with the checkpoint,
    no pickle, no network, and no more memory than its weights ask for. Raises what from_pretrained does, and
    GrpoError for weights that are no finite real numbers.
    """
    exact_products()
    with bounded(checkpoint), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters in them is raised
        model, report = auto_class.from_pretrained(
            str(checkpoint),
            dtype=torch.float32,
            attn_implementation="eager" if attention == "eager" else "sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    check_kinds(checkpoint, {name for name, _ in model.named_parameters()})
    check_weights(checkpoint, model)
    return model, report


def _read_model(checkpoint: Path, attention: str) -> PreTrainedModel:
    check_model(checkpoint, attention)
    _require_file(checkpoint, WEIGHT_FILES, "weights")
    model: PreTrainedModel
    with refusals(str(checkpoint), NO_MODEL):
        # Shapes that differ are reported below, in one line.
        model, report = load_pretrained(
            AutoModelForCausalLM, checkpoint, attention, ignore_mismatched_sizes=True
        )
    for name, found, right in sorted(report["mismatched_keys"]):
        message = f"weight {name} has shape {list(found)}; config.json asks for {list(right)}"
        raise CorruptError(f"{checkpoint}: {message}")
    for problem in ("missing", "unexpected"):
        if names := sorted(report[f"{problem}_keys"]):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            message = f"{problem} weight {names[0]}{more}; the weights must be exactly those of config.json"
            raise CorruptError(f"{checkpoint}: {message}")
    return model


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
        part = config.get("text_config")
        ids = part.get("eos_token_id") if isinstance(part, dict) else None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(number) is int and 0 <= number < 2**31 for number in ids):
        raise CorruptError(f"{path}: eos_token_id is {shorten(str(ids), 80)}; token ids are right")
    return frozenset(ids)


def _require_file(checkpoint: Path, names: tuple[str, ...], what: str) -> None:
    require_checkpoint(checkpoint)
    if not any((checkpoint / name).is_file() for name in names):
        raise InputError(f"{checkpoint}: has no {' or '.join(names)}; {what} cannot be loaded without")
