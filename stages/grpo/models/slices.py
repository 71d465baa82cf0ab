"""slices: a checkpoint -> its model without weights, and of each weight what one process keeps.

Nobody holds the model whole: a weight is read from the file's own pages, those of its rows that are asked
for. What transformers makes of several (a layer's experts are one weight in memory) it makes a layer at a
time. load_model() is for who has all of it, and gives the same bits.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from grpo.models.attention import exact_products
from grpo.models.bounds import bounded, check_finite, check_kinds, weight_files
from grpo.models.loading import NO_MODEL, check_model
from grpo.models.refusals import refusals
from grpo.models.weights import by_layer, plain_state, published_form

Put = Callable[[Tensor, Any], Tensor]
"""Copies a whole tensor, or what a file has of it, into one of a model; gives what this process has of it."""


class _Layer(NamedTuple):
    plain: dict[str, str]
    """Names in the files -> those of the model's weights that are the same numbers."""
    stored: list[str]
    """Names in the files of what others are made of."""
    made: list[str]


class Slices:
    """The checkpoint of a model; see slices_of(). model: with buffers, and without its weights."""

    def __init__(self, checkpoint: Path, model: PreTrainedModel, layers: list[_Layer]) -> None:
        self.checkpoint, self.model, self._layers = checkpoint, model, layers

    @torch.no_grad()
    def fill(self, model: PreTrainedModel, put: Put) -> None:
        """Have `model` hold what load_model() gives; there may be an adapter in it, which stays as it is.

        Raises CorruptError for a weight that is not finite, of which others may be in the model already.
        """
        own, parameters = plain_state(model), dict(self.model.named_parameters())
        buffers, kept = dict(model.named_buffers()), plain_state(self.model)
        for name, buffer in self.model.named_buffers():
            if name not in kept:
                put(buffers[name], buffer)
        with refusals(str(self.checkpoint), NO_MODEL), _stored(self.checkpoint) as stored:
            for name, weight in self._weights(stored):
                part = put(own[name], weight)
                if name in parameters:
                    check_finite(self.checkpoint, name, part)

    def _weights(self, stored: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        builder = copy.deepcopy(self.model) if any(layer.made for layer in self._layers) else None
        for layer in self._layers:
            yield from ((name, stored[key]) for key, name in layer.plain.items())
            if builder is not None and layer.made:
                yield from _made(builder, {key: stored[key] for key in layer.stored}, layer.made)


def slices_of(checkpoint: Path, attention: str) -> Slices | None:
    """None where its files are in another form than the one that transformers writes.

    attention: as load_model takes it. Raises as that does, but for what the weights alone say.
    """
    check_model(checkpoint, attention)
    model = _without_weights(checkpoint, attention)
    state, layers = plain_state(model), []
    with refusals(str(checkpoint), NO_MODEL), _stored(checkpoint) as stored:
        missing = {name: tuple(each.get_shape()) for name, each in stored.items()}
    for names in by_layer(model, state):
        own = {id(state[name]): name for name in names}
        published = published_form(model, {name: state[name] for name in names})
        for key, weight in published.items():
            if missing.pop(key, None) != tuple(weight.shape):
                return None
        plain = {key: own[id(weight)] for key, weight in published.items() if id(weight) in own}
        others = [key for key in published if key not in plain]
        layers.append(_Layer(plain, others, [name for name in names if name not in plain.values()]))
    if missing:
        return None
    check_kinds(checkpoint, {name for name, _ in model.named_parameters()})
    return Slices(checkpoint, model, layers)


def _without_weights(checkpoint: Path, attention: str) -> PreTrainedModel:
    """As from_pretrained() builds it: on the meta device, then buffers that no file has as they begin."""
    exact_products()
    auto: Any = AutoModelForCausalLM
    with refusals(str(checkpoint), NO_MODEL), bounded(checkpoint), warnings.catch_warnings(action="ignore"):
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(
                check_model(checkpoint, attention),
                dtype=torch.float32,
                attn_implementation="eager" if attention == "eager" else "sdpa",
                trust_remote_code=False,
            )
        for name, buffer in dict(model.named_buffers()).items():
            module, _, own = name.rpartition(".")
            model.get_submodule(module)._buffers[own] = torch.empty_like(buffer, device="cpu")
        kept = model.state_dict().keys()
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            tensor._is_hf_initialized = isinstance(tensor, nn.Parameter) or name in kept  # type: ignore[attr-defined]
        model.initialize_weights()  # type: ignore[no-untyped-call]
    # What published_form() turns round; without any it would leave another order than from_pretrained() does.
    forms: Any = get_model_conversion_mapping(model, add_legacy=False)
    kept_forms: Any = [form for form in forms if not isinstance(form, PrefixChange)]
    model._weight_conversions = kept_forms
    nn.Module.eval(model)
    return model


def _made(builder: PreTrainedModel, stored: dict[str, Any], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """What from_pretrained() makes of a layer's `stored` weights, in a model without any, which it stays."""
    empty = {name: builder.get_parameter_or_buffer(name) for name in names}
    mapping: Any = get_model_conversion_mapping(builder)
    config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=mapping)
    convert_and_load_state_dict_in_model(builder, stored, config)
    for name, weight in empty.items():
        module, _, own = name.rpartition(".")
        made = builder.get_parameter_or_buffer(name)
        setattr(builder.get_submodule(module), own, weight)
        if made is weight:
            raise RuntimeError(f"weight {name} cannot be made of what the files have")
        yield name, made


@contextmanager
def _stored(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The weights in its files by name; none is read before a part of it is asked for."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(checkpoint)]
        yield {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
