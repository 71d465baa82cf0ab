"""compare.difference: a number in two runs -> their difference with its confidence interval, by group.

The rollouts of a group share their prompt, so that the group is what is independent, not the rollout. Where
both runs drew the same prompts, groups are compared pair by pair: how hard a prompt is then drops out. A
group that only one of them has a number of is left out of that.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

NORMAL_95 = 1.959964  # 97.5 % quantile of the standard normal distribution
Group = tuple[int, int, int]  # iteration, group_id, prompt_id


def difference(a: dict[Group, float], b: dict[Group, float], same_prompts: bool = True) -> dict[str, Any]:
    """Means of `a` and `b` over groups, `b - a`, and the ends of its 95 % interval (normal approximation).

    Paired over the groups of the same prompts that both have, where these are more than half of the groups of
    the run that has fewer; else that of two samples (Welch): runs that drew on their own have a few in common
    by chance, and those few say less than all. same_prompts: whether a prompt_id is one prompt in both. The
    interval is null for fewer than two groups.
    """
    common = a.keys() & b.keys() if same_prompts else set()
    paired = 2 * len(common) > min(len(a), len(b))
    if paired:
        a, b = ({key: run[key] for key in common} for run in (a, b))
    values_a, values_b = (np.array([run[key] for key in sorted(run)]) for run in (a, b))
    if paired:
        error = _standard_error(values_b - values_a)
    else:
        errors = (_standard_error(values_a), _standard_error(values_b))
        error = None if None in errors else math.hypot(*(e for e in errors if e is not None))
    mean_a, mean_b = float(values_a.mean()), float(values_b.mean())
    apart = mean_b - mean_a
    interval = {} if error is None else {"low": apart - NORMAL_95 * error, "high": apart + NORMAL_95 * error}
    return {
        "a": mean_a,
        "b": mean_b,
        "difference": apart,
        "low": None,
        "high": None,
        **interval,
        "groups_a": len(values_a),
        "groups_b": len(values_b),
        "paired": paired,
    }


def _standard_error(values: NDArray[Any]) -> float | None:
    """Of the mean: sample standard deviation (n-1) / sqrt(n); null for fewer than two."""
    if len(values) < 2:
        return None
    return float(values.std(ddof=1)) / math.sqrt(len(values))
