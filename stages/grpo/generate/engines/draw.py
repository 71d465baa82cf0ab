"""draw: logits + numbers in [0, 1) -> tokens and their log-probabilities.

By inverse CDF, not by a generator: a token is a function of its logits and its own number, whoever else is
in the batch. Shapes: B samples, N rows, T response tokens, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo.errors import DataError
from grpo.models.logprobs import log_probabilities


def uniforms(seeds: Sequence[int], count: int) -> np.ndarray:
    """The numbers in [0, 1) that decide the tokens of samples, float64 [B, count]: token t uses number t.

    Row b is np.random.Generator(np.random.Philox(key=seeds[b])).random(count).
    """
    philox = np.random.Philox(key=0)
    generator, state = np.random.Generator(philox), philox.state
    uniforms_BT = np.empty((len(seeds), count))
    for uniforms_T, seed in zip(uniforms_BT, seeds, strict=True):
        # A new Philox per seed would each time ask the system for entropy that a key makes useless.
        state["state"]["key"][0] = seed
        philox.state = state
        generator.random(out=uniforms_T)
    return uniforms_BT


def draw(logits_NV: Tensor, uniforms_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability: tokens_N int64, logprobs_N float32 after temperature.

    Temperature 0 takes the likeliest token (the first of equals), with its log-probability at temperature 1.
    """
    temperature_N = torch.full_like(uniforms_N, temperature or 1.0)
    logprobs_NV = log_probabilities(logits_NV, temperature_N)
    if not bool(logprobs_NV.amax(-1).isfinite().all()):
        raise DataError("the policy's logits hold NaN or infinity: its weights have diverged or are damaged")
    tokens_N = pick(logprobs_NV.exp(), uniforms_N) if temperature else logprobs_NV.argmax(-1)
    return tokens_N, logprobs_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)


def penalise(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Logits in which those of tokens seen before are divided by `penalty`, or times it where negative.

    (CTRL, arXiv 1909.05858, as transformers and vLLM have it: prompt and response both count.)
    """
    penalised_NV = torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty)
    return torch.where(seen_NV, penalised_NV, logits_NV)


def pick(probabilities_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Inverse CDF: per row the first token whose cumulative probability exceeds its number in [0, 1).

    A token of probability 0 never exceeds what came before it, so it is never picked. uniforms_N: float64.
    """
    cumulative_NV = probabilities_NV.cumsum(-1, dtype=torch.float64)
    # float32 probabilities do not add up to 1. A float64 below 1 times the total rounds to less than the
    # total, so there always is a token that exceeds it.
    target_N = uniforms_N * cumulative_NV[:, -1]
    return torch.searchsorted(cumulative_NV, target_N.unsqueeze(-1), right=True).squeeze(-1)
