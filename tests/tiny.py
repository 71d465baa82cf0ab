"""tiny: configurations of the random checkpoints that tests build, made in milliseconds."""

from typing import Any

from transformers import Qwen2Config

BYTES = 258  # vocabulary of the starter's tokenizer: the bytes, end of sequence (256), padding (257)


def qwen2(**changes: Any) -> Qwen2Config:
    """A Qwen2 with two layers, 32 wide, over BYTES, with any key changed."""
    values = {
        "vocab_size": BYTES,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 257,
    }
    return Qwen2Config(**(values | changes))
