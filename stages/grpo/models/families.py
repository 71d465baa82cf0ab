"""families: which models can be trained here, and what is said of those that cannot."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from grpo.errors import InputError

FAMILIES = (
    *("apertus", "arcee", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "falcon"),
    *("gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox", "granite", "granitemoe", "llama"),
    *("mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2"),
    *("qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma"),
)
"""`model_type` of those whose log-probs a test compares with plain transformers in eager attention, in the
learner and in the built-in engine. Others may well be right: `grpo doctor --model` compares any."""


def check_family(checkpoint: Path, config: PreTrainedConfig, model_class: Any, attention: str) -> None:
    """Raise InputError where weights or attention of a model are of a kind that is not trained here.

    model_class: of transformers, or None where it has none; attention: `auto`, `sdpa` or `eager`.
    """
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        values = quantised if isinstance(quantised, dict) else vars(quantised)
        raise InputError(
            f"{checkpoint}: is quantised ({values.get('quant_method', 'quantization_config')}); the learner"
            " trains weights that are not: take the checkpoint it was made of"
            " (the engine alone may be: generate.engine_options.quantization)"
        )
    if attention != "eager" and not getattr(model_class, "_supports_sdpa", True):
        raise InputError(
            f"{checkpoint}: the attention of {config.model_type} is none that sdpa computes; set"
            " model_options.attn_implementation: eager, which is slower, and have `grpo doctor --model`"
            f" compare it, or take a model of a family that is tested: {', '.join(FAMILIES)}"
        )
