"""attention: another function in place of a model's own attention.

transformers makes no mask for a name it does not know, and hands on unknown arguments of forward()
(huggingface.co/docs/transformers/attention_interface). Not every model's code does: who uses it tries first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, PreTrainedModel

# What models hand to an attention function and their evaluation on sequences without padding need not know.
# Anything else that is not None (a mask, a window, a softcap, sinks, a bias) may change the result.
_IGNORED = {
    *("dropout", "is_causal", "position_ids", "cache_position", "use_cache"),
    *("output_attentions", "output_router_logits"),
}


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
