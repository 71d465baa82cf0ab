"""attention: the one that computes what a model's own code asks for, or another function in its place.

transformers makes no mask for a name it does not know, and hands on unknown arguments of forward()
(huggingface.co/docs/transformers/attention_interface). Not every model's code does: who uses it tries first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from grpo.errors import InputError

# What models hand to an attention function and their evaluation on sequences without padding need not know.
# Anything else that is not None (a mask, a window, a softcap, sinks, a bias) may change the result.
_IGNORED = {
    *("dropout", "is_causal", "position_ids", "cache_position", "use_cache"),
    *("output_attentions", "output_router_logits"),
}
# transformers' sdpa computes with the bias, its mask with the window; all else it drops without a word.
_SDPA_COMPUTES = _IGNORED | {"position_bias", "sliding_window"}
_PROBE = "grpo_probe"
_PROBE_TOKENS = 8
# Between two ways to compute the same logits, of the largest; what is another model is 0.01 and more apart.
_TOLERANCE = 1e-3


def exact_products() -> None:
    """No TF32: it is 1e-3 off, as much as another mask, and others in the process may have asked for it."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def attending(
    model: PreTrainedModel, name: str, function: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Within, the model's attention is that of `name`: `function`, or None where transformers knows it."""
    before = model.config._attn_implementation
    if function is not None:
        AttentionInterface.register(name, function)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)


def refuse_others(name: str, others: dict[str, Any]) -> None:
    """Raise TypeError for an argument that the attention function `name` does not compute with."""
    for argument, value in others.items():
        if value is not None and argument not in _IGNORED:
            raise TypeError(f"{name} takes no {argument}")


@torch.no_grad()  # not inference mode: what is gathered within serves training too
def choose_attention(model: PreTrainedModel, wanted: str) -> None:
    """Leave a model that was loaded with sdpa in the attention that computes it: sdpa, or else eager.

    wanted: `auto`, `sdpa` or `eager`. Raises InputError where `sdpa` is wanted and would not compute it.
    """
    if wanted == "eager":
        return
    dropped = sdpa_drops(model)
    if dropped and wanted == "sdpa":
        raise InputError(
            f"model_options.attn_implementation: sdpa does not compute {dropped}, which"
            f" {model.config.model_type} has; set it to eager, or leave it out"
        )
    if dropped:
        model.set_attn_implementation("eager")


def sdpa_drops(model: PreTrainedModel) -> str:
    """What the model hands to its attention and sdpa does not compute with; empty: it computes all.

    A model that has its attention in its own code shows by its logits whether that differs from eager.
    """
    if not model._supports_attention_backend:
        eager = _logits(model, "eager")
        apart = (eager - _logits(model, "sdpa")).abs().max()
        # Weights that give no numbers are found by others, and said as what they are.
        return "the eager attention" if apart > _TOLERANCE * eager.abs().max() else ""
    handed: set[str] = set()

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any
    ) -> tuple[Tensor, None]:
        handed.update(name for name, given in others.items() if given is not None)
        # A token that sees itself alone finds its own value.
        found = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return found.transpose(1, 2).contiguous(), None

    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with attending(model, _PROBE, record):
        model(input_ids=token, use_cache=False)
    return ", ".join(sorted(handed - _SDPA_COMPUTES - {"scaling"}))


@torch.no_grad()  # not inference mode: what is gathered within serves training too
def is_causal(model: PreTrainedModel) -> bool:
    """Whether no token sees a later one: the last of a few tokens changes no logits before it."""
    ids_BL = torch.arange(_PROBE_TOKENS, device=model.device).repeat(2, 1)
    ids_BL[1, -1] = 0
    one, other = model(input_ids=ids_BL % vocabulary(model), use_cache=False).logits[:, :-1].unbind()
    return not bool((one - other).abs().max() > _TOLERANCE * one.abs().max())


def attention_window(config: PreTrainedConfig) -> int | None:
    """The largest window or chunk of the model's layers: a token sees none that is so many before it.

    None where no sequence within the model's context is longer.
    """
    text = config.get_text_config(decoder=True)
    sizes = {
        "sliding_attention": getattr(text, "use_sliding_window", True)
        and getattr(text, "sliding_window", None),
        "chunked_attention": getattr(text, "attention_chunk_size", None),
        "local": getattr(text, "window_size", None),
    }
    kinds = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None) or sizes
    largest = max((int(size) for kind, size in sizes.items() if size and kind in kinds), default=None)
    context = getattr(text, "max_position_embeddings", None)
    return None if largest is None or (context is not None and context <= largest) else largest


def _logits(model: PreTrainedModel, attention: str) -> Tensor:
    ids_1L = torch.arange(_PROBE_TOKENS, device=model.device)[None] % vocabulary(model)
    with attending(model, attention):
        logits: Tensor = model(input_ids=ids_1L, use_cache=False).logits
    return logits


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens the model knows."""
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size
