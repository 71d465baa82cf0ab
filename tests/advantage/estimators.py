"""The advantage estimators once more: plain numpy in float64, a group at a time, from the formulas alone."""

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def equal(values: Array, magnitudes: Array) -> bool:
    """Whether values are equal but for the rounding of sums of such magnitudes."""
    return bool(values.max() - values.min() <= 1e-9 * magnitudes.max())


def group(terms: list[Array], lengths: list[Array], epsilon: float) -> list[Array]:
    return [(r - r.mean()) / (r.std(ddof=1) + epsilon) for r in map(total, terms)]


def rloo(terms: list[Array], lengths: list[Array], epsilon: float) -> list[Array]:
    return [np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))]) for r in map(total, terms)]


def opo(terms: list[Array], lengths: list[Array], epsilon: float) -> list[Array]:
    return [r - np.average(r, weights=t) for r, t in zip(map(total, terms), lengths, strict=True)]


def maxrl(terms: list[Array], lengths: list[Array], epsilon: float) -> list[Array]:
    return [(r - r.mean()) / r.mean() if r.mean() else 0 * r for r in map(total, terms)]


def best_of_k(terms: list[Array], lengths: list[Array], epsilon: float) -> list[Array]:
    found = []
    for r in map(total, terms):
        second, first = np.sort(r)[-2:]
        found.append(np.where(r == first, (first - second) / (r.std(ddof=1) + epsilon), 0.0))
    return found


def gdpo(values: list[Array], weights: Array, epsilon: float) -> list[Array]:
    """values[g]: [rewards, rollouts]."""
    sums = []
    for v in values:
        if equal(weights @ v, np.abs(weights) @ np.abs(v)):
            sums.append(np.zeros(v.shape[1]))
            continue
        each = [
            np.zeros(len(r)) if equal(r, np.abs(r)) else (r - r.mean()) / (r.std(ddof=1) + epsilon) for r in v
        ]
        sums.append(weights @ np.array(each))
    flat = np.concatenate(sums)
    return [(s - flat.mean()) / (flat.std(ddof=1) + epsilon) for s in sums]


def reinforce_pp(terms: list[Array], lengths: list[Array], epsilon: float) -> list[Array]:
    centred = [r - r.mean() for r in map(total, terms)]
    tokens = np.concatenate([np.repeat(b, t.astype(int)) for b, t in zip(centred, lengths, strict=True)])
    return [(b - tokens.mean()) / (tokens.std(ddof=1) + epsilon) for b in centred]


def pass_at_k(rewards: Array, k: int) -> Array:
    """By counting: R is the share of subsets of k with a right one; a rollout's own, of those with it."""
    n = len(rewards)

    def passes(chosen: tuple[int, ...]) -> bool:
        return any(rewards[i] == 1 for i in chosen)

    subsets = list(combinations(range(n), k))
    mean = sum(map(passes, subsets)) / comb(n, k)
    deviation = np.sqrt(mean * (1 - mean))
    if deviation == 0:
        return np.zeros(n)
    own = [np.mean([passes(subset) for subset in subsets if i in subset]) for i in range(n)]
    found: Array = (np.array(own) - mean) / deviation
    return found


def total(terms: Array) -> Array:
    """Rewards of the rollouts of a group."""
    summed: Array = terms.sum(axis=0)
    return summed


PLAIN = {
    "group": group,
    "rloo": rloo,
    "opo": opo,
    "maxrl": maxrl,
    "best_of_k": best_of_k,
    "reinforce_pp": reinforce_pp,
}
