"""A tiny configuration of every family, with what it is known for: softcaps, windows, experts, scales.

`model_type` of transformers -> keys of its configuration, beside SIZES. Windows are shorter than the
sequences, caps so small that they show, and initial weights so large that log-probs are far from uniform.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 64
WINDOW = 6
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
HEAD = {"head_dim": 8}
WINDOWED = {"sliding_window": WINDOW}
HALF = WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
ROUTED |= {"first_k_dense_replace": 1}
TINY: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": HEAD | HALF | {"logit_scale": 0.25},
    "deepseek_v2": LATENT | EXPERTS | ROUTED,
    "deepseek_v3": LATENT | EXPERTS | ROUTED,
    "ernie4_5": HEAD,
    "exaone4": HEAD | HALF,
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "gemma": HEAD,
    "gemma2": HEAD | HALF | CAPS,
    "gemma3_text": HEAD | HALF | {"query_pre_attn_scalar": 8},
    "glm": HEAD,
    "glm4": HEAD,
    "gpt2": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "granitemoe": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "num_local_experts": 4},
    "llama": {},
    "mistral": WINDOWED,
    "mixtral": WINDOWED | {"num_local_experts": 4},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": HALF,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "phi": {},
    "phi3": WINDOWED,
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1} | WINDOWED | {"tie_word_embeddings": True},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3": HEAD | {"tie_word_embeddings": True},
    "qwen3_moe": HEAD | EXPERTS | {"num_experts": 4},
    "seed_oss": HEAD,
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": WINDOWED,
    "vaultgemma": HEAD | HALF | CAPS,
}
# What sdpa would not compute: the attention that these are to be read with.
EAGER = {"gemma2", "vaultgemma"}


def configuration(family: str, changes: dict[str, Any] | None = None) -> Any:
    return CONFIG_MAPPING[family](**(SIZES | TINY.get(family, {}) | (changes or {})))


def write_checkpoint(path: Path, family: str, changes: dict[str, Any] | None = None) -> Path:
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(configuration(family, changes), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    return path
