"""size: how large a checkpoint is, by its headers and by its configuration; no weight is read."""

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedConfig

from grpo.artifacts import checkpoint_files
from grpo.errors import CorruptError
from grpo.models.bounds import shapes_in, weight_files

# Whose queries and keys go through norms of their own; no key of a configuration says so.
_NORMED = ("qwen3", "gemma3", "olmo2", "olmo3")
# Kinds of layers with keys and values; others ("linear_attention", "mamba", "conv") have a state.
_ATTENTION = ("attention", "full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that memory follows from.

    intermediate: of all experts that a token goes through. queries, keys: of all heads together.
    recurrent: some layers keep a state of their own instead of keys and values.
    """

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool
    normed: bool = False
    recurrent: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear modules, by the names that Llama has and most others."""
        hidden, inner = self.hidden, self.intermediate
        return {
            "q_proj": (hidden, self.queries),
            "k_proj": (hidden, self.keys),
            "v_proj": (hidden, self.keys),
            "o_proj": (self.queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def parameters(self) -> int:
        """Of a dense model, but for norms and biases."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * sum(map(math.prod, self.matrices.values()))


def shape_of(config: PreTrainedConfig) -> Shape | None:
    """The shape that a configuration describes; None where it lacks a number that it needs."""
    text = config.get_text_config(decoder=True)

    def number(name: str, otherwise: int = 0) -> int:
        found = getattr(text, name, None)
        return found if isinstance(found, int) and found > 0 else otherwise

    layers, hidden, heads = map(number, ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    vocabulary = number("vocab_size")
    if not (layers and hidden and heads and vocabulary):
        return None
    inner = number("intermediate_size", 4 * hidden)
    if number("moe_intermediate_size"):
        inner = number("moe_intermediate_size") * number("num_experts_per_tok", 1)
    width = number("head_dim", hidden // heads)
    return Shape(
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        queries=heads * width,
        keys=number("num_key_value_heads", heads) * width,
        vocabulary=vocabulary,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        normed=str(text.model_type).startswith(_NORMED),
        recurrent=any(kind not in _ATTENTION for kind in _kinds(text)),
    )


def _kinds(text: PreTrainedConfig) -> list[str]:
    """Of the layers, by either name that configurations have for them; none: all are attention."""
    return list(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())


def num_parameters(folder: Path) -> int:
    """Of a checkpoint, from the headers of what transformers reads. Raises InputError, CorruptError."""
    checkpoint_files(folder)
    total = 0
    for path in weight_files(folder):
        try:
            total += sum(map(math.prod, shapes_in(path)))
        except SafetensorError as error:
            raise CorruptError(f"{path}: is not safetensors: {error}") from error
    return total
