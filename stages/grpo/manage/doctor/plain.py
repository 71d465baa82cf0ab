"""plain: log-probs by transformers alone, in eager attention, one sequence at a time.

Nothing of how the package loads, batches, caches or reads a model is in it: learner and engine share most of
that, and so agree on what both get wrong.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from grpo.models.loading import best_device
from grpo.models.refusals import refusals


@torch.inference_mode()
def plain_logprobs(
    checkpoint: Path, rollouts: Iterable[tuple[list[int], list[int]]], temperature: float
) -> list[np.ndarray]:
    """Of each token of each response, float64 [T], for (prompt, response) pairs. Raises as load_model()."""
    auto: Any = AutoModelForCausalLM
    with refusals(str(checkpoint), "plain transformers cannot compute it in eager attention"):
        model = auto.from_pretrained(
            str(checkpoint),
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        model.to(best_device()).eval()
        found = []
        for prompt, response in rollouts:
            ids_1L = torch.tensor([prompt + response], device=model.device)
            logits_TV = model(input_ids=ids_1L, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
            logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
            logprobs_T1 = logprobs_TV.gather(-1, ids_1L[0, len(prompt) :, None])
            found.append(logprobs_T1[:, 0].cpu().numpy())
    return found
