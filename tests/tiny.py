"""tiny: configurations of the random checkpoints that tests build, made in milliseconds."""

from typing import Any

from transformers import Qwen2Config, Qwen3Config

WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Of every tiny model, by the names that most configurations have."""

BYTES = 258  # vocabulary of the starter's tokenizer: the bytes, end of sequence (256), padding (257)


def qwen2(**changes: Any) -> Qwen2Config:
    """A Qwen2 of WIDTHS over BYTES, with any key changed."""
    values = {
        **WIDTHS,
        "vocab_size": BYTES,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 257,
    }
    return Qwen2Config(**(values | changes))


def qwen3_for_vllm() -> Qwen3Config:
    """A Qwen3 over BYTES with tied embeddings. vLLM's kernels want heads of 32 at least."""
    return Qwen3Config(
        vocab_size=BYTES,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )


def one_layer(vocabulary: int, **special: Any) -> Qwen3Config:
    """The smallest Qwen3, as in starter_model.py. special: ids of special tokens."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        **special,
    )
