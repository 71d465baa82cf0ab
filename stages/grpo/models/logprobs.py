"""logprobs: logits -> the log-probability of each token, and the entropy of its distribution.

The sampler, the learner and the reference all call this one formula, log_softmax(logits / temperature), so
that a difference between them is one of their logits. Shapes: N positions of any rows, V vocabulary.
"""

import torch
from torch import Tensor


def log_probabilities(logits_NV: Tensor, temperature_N: Tensor) -> Tensor:
    """Log-probabilities [N, V] over the vocabulary at each position's temperature (> 0).

    float32, or float64 where the logits are. A logit of -inf gives -inf: a token that cannot occur.
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    scaled_NV = logits_NV.to(dtype) / temperature_N.to(dtype).unsqueeze(-1)
    return torch.log_softmax(scaled_NV, dim=-1)


def token_logprobs(
    logits_NV: Tensor, tokens_N: Tensor, temperature_N: Tensor, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each position's token and, when asked for, the entropy there in nats.

    logits_NV: any floating type; tokens_N: int64; temperature_N: > 0. Returns logprobs_N (<= 0) and
    entropy_N (>= 0) or None, of the type log_probabilities has. Both can be differentiated.
    """
    logprobs_NV = log_probabilities(logits_NV, temperature_N)
    logprobs_N = logprobs_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)
    return logprobs_N, entropy(logprobs_NV) if with_entropy else None


def entropy(logprobs_NV: Tensor) -> Tensor:
    """Entropy [N] in nats: -sum p log p, where a token of probability 0 adds 0."""
    # 0 * -inf would be NaN, in the value and in the gradient.
    finite_NV = logprobs_NV.masked_fill(logprobs_NV == -torch.inf, 0.0)
    return -(logprobs_NV.exp() * finite_NV).sum(dim=-1)
