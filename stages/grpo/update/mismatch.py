"""mismatch: how far the learner's log-probs are from the sampler's, before any clipping (docs/math.md).

Measured on the rollouts of an iteration's first optimiser step, where the weights still are pi_old's: at
learning rate 0 it is what the numerics of the two alone give.
"""

from collections.abc import Sequence

import numpy as np

from grpo.config.model import SAMPLER_CORRECTION_CAPS

TOKEN_CAP = SAMPLER_CORRECTION_CAPS["token"]


def mismatch(
    policy_logprobs: Sequence[np.ndarray], old_logprobs: Sequence[np.ndarray], cap: float = TOKEN_CAP
) -> dict[str, float]:
    """The mismatch columns of `updates`, over all tokens of the rollouts given; each a float32 [T_i] array.

    With w = exp(policy - old): mean and max |policy - old|; the k3 estimate of KL(old || policy),
    mean(w - 1 - log w); (sum w)^2 / (N sum w^2), a share in (0, 1]; the share of tokens with w over the cap.
    """
    d_N = np.concatenate(policy_logprobs).astype(np.float64) - np.concatenate(old_logprobs)
    w_N = np.exp(np.clip(d_N, -80, 80))  # e^80 squared is still finite in float64
    return {
        "mismatch_mean": float(np.abs(d_N).mean()),
        "mismatch_max": float(np.abs(d_N).max()),
        "mismatch_kl": float((w_N - 1 - d_N).mean()),
        "effective_sample_size": float(w_N.sum() ** 2 / (len(w_N) * np.square(w_N).sum())),
        "over_cap_fraction": float((w_N > cap).mean()),
    }
