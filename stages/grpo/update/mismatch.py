"""mismatch: how far the learner's log-probs are from the sampler's, before any clipping (docs/math.md).

Measured on the rollouts of an iteration's first optimiser step, where the weights still are pi_old's: at
learning rate 0 it is what the numerics of the two alone give.
"""

from collections.abc import Iterable

import numpy as np

from grpo.config.update import SAMPLER_CORRECTION_CAPS

TOKEN_CAP = SAMPLER_CORRECTION_CAPS["token"]


def mismatch(pairs: Iterable[tuple[np.ndarray, np.ndarray]], cap: float = TOKEN_CAP) -> dict[str, float]:
    """The mismatch columns of `updates`, over all tokens of rollouts given as (policy, old) log-probs [T_i].

    With w = exp(policy - old): mean and max |policy - old|; the k3 estimate of KL(old || policy),
    mean(w - 1 - log w); (sum w)^2 / (N sum w^2), a share in (0, 1]; the share of tokens with w over the cap.
    """
    count = over_cap = 0
    largest = gaps = weights = squares = k3 = 0.0
    for policy_logprobs_T, old_logprobs_T in pairs:
        d_T = policy_logprobs_T.astype(np.float64) - old_logprobs_T
        w_T = np.exp(np.clip(d_T, -80, 80))  # e^80 squared is still finite in float64
        count += len(d_T)
        gaps += float(np.abs(d_T).sum())
        largest = max(largest, float(np.abs(d_T).max()))
        k3 += float((w_T - 1 - d_T).sum())
        weights += float(w_T.sum())
        squares += float(np.square(w_T).sum())
        over_cap += int((w_T > cap).sum())
    return {
        "mismatch_mean": gaps / count,
        "mismatch_max": largest,
        "mismatch_kl": k3 / count,
        "effective_sample_size": weights**2 / (count * squares),
        "over_cap_fraction": over_cap / count,
    }
