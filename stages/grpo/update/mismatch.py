"""mismatch: how far the learner's log-probs are from the sampler's, before any clipping (docs/math.md)."""

from collections.abc import Iterable

import numpy as np

from grpo.config.update import SAMPLER_CORRECTION_CAPS

TOKEN_CAP = SAMPLER_CORRECTION_CAPS["token"]


def mismatch(pairs: Iterable[tuple[np.ndarray, np.ndarray]], cap: float = TOKEN_CAP) -> dict[str, float]:
    """The mismatch columns of `updates`, over all tokens of rollouts given as (policy, old) log-probs [T_i].

    With w = exp(policy - old): mean and max |policy - old|; the k3 estimate of KL(old || policy),
    mean(w - 1 - log w); (sum w)^2 / (N sum w^2), a share in (0, 1]; the share of tokens with w over the cap.
    """
    largest, sums = 0.0, []
    for policy_logprobs_T, old_logprobs_T in pairs:
        d_T = policy_logprobs_T.astype(np.float64) - old_logprobs_T
        w_T = np.exp(np.clip(d_T, -80, 80))  # e^80 squared is still finite in float64
        largest = max(largest, float(np.abs(d_T).max()))
        parts = (np.abs(d_T), w_T - 1 - d_T, w_T, np.square(w_T), w_T > cap)
        sums.append([len(d_T), *(part.sum() for part in parts)])
    count, gaps, k3, weights, squares, over_cap = np.sum(sums, axis=0).tolist()
    return {
        "mismatch_mean": gaps / count,
        "mismatch_max": largest,
        "mismatch_kl": k3 / count,
        "effective_sample_size": weights**2 / (count * squares),
        "over_cap_fraction": over_cap / count,
    }
