"""compare.rank: rank correlations of two columns of numbers, exact in their counts, in O(n log n).

Ties are handled as usual: Spearman gives equal values the mean of their ranks, Kendall's tau-b leaves pairs
that are tied out of the side of the denominator on which they are tied. A constant column has no ranks: null.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]


def average_ranks(values: Numbers) -> Numbers:
    """Ranks from 1; equal values share the mean of theirs. Example: 5, 7, 7 -> 1, 2.5, 2.5."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Numbers = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def spearman(a: Numbers, b: Numbers) -> float | None:
    """Pearson's correlation of average ranks, in [-1, 1]; null for fewer than two or a constant one."""
    if _constant(a) or _constant(b):
        return None
    x, y = (ranks - ranks.mean() for ranks in (average_ranks(a), average_ranks(b)))
    return float((x @ y) / math.sqrt(float(x @ x)) / math.sqrt(float(y @ y)))


def kendall(a: Numbers, b: Numbers) -> float | None:
    """Kendall's tau-b in [-1, 1] by Knight's method (JASA 61, 1966); null as for spearman()."""
    if _constant(a) or _constant(b):
        return None
    order = np.lexsort((b, a))
    _, ranks_a = np.unique(a[order], return_inverse=True)
    _, ranks_b = np.unique(b[order], return_inverse=True)
    pairs = len(a) * (len(a) - 1) // 2
    tied_a, tied_b = _tied_pairs(ranks_a), _tied_pairs(ranks_b)
    tied_both = _tied_pairs(ranks_a * (int(ranks_b.max()) + 1) + ranks_b)
    flipped = inversions(ranks_b)  # within a tie of `a` they are in order, so that none is counted
    agreeing = pairs - tied_a - tied_b + tied_both - flipped
    return (agreeing - flipped) / math.sqrt(pairs - tied_a) / math.sqrt(pairs - tied_b)


def inversions(ranks: Numbers) -> int:
    """Number of i < j with ranks[i] > ranks[j], for whole numbers from 0.

    Bit by bit from the highest: among equal higher bits, each 0 is passed by the 1s that stand before it;
    then the numbers are sorted by that bit too, keeping their order otherwise.
    """
    total = 0
    for bit in reversed(range(int(ranks.max()).bit_length())):
        ones = (ranks >> bit) & 1
        ones_before = np.cumsum(ones) - ones
        higher = ranks >> (bit + 1)
        starts = np.flatnonzero(np.diff(higher, prepend=-1))
        lengths = np.diff(starts, append=len(ranks))
        in_block = ones_before - np.repeat(ones_before[starts], lengths)
        total += int(in_block[ones == 0].sum())
        ranks = ranks[np.argsort(ranks >> bit, kind="stable")]
    return total


def _constant(values: Numbers) -> bool:
    return len(values) < 2 or bool((values == values[0]).all())


def _tied_pairs(ranks: Numbers) -> int:
    _, counts = np.unique(ranks, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())
