"""entropy: the weight of the entropy term of each step, where it follows a target. Plain numbers in and out.

A function of the step before alone, which is in `updates`: a process that resumes goes on as one that stayed.
"""

from collections.abc import Mapping
from typing import Any

from grpo.config import UpdateConfig


def entropy_weight(config: UpdateConfig, before: Mapping[str, Any] | None) -> tuple[float, float]:
    """The weight c of a step, and what of it is applied: c where the step before was at most at the target.

    before: its row of `updates`; None: the first of a run, in which nothing is known and nothing applied. c
    begins as entropy_coefficient and moves by delta, within min and max (Skywork-OR1, arXiv 2505.22312).
    """
    assert config.entropy_target is not None
    entropy = None if before is None else before.get("entropy")  # none where the step took nothing
    weight = None if before is None else before.get("entropy_coefficient")
    is_low = entropy is not None and entropy <= config.entropy_target
    if weight is None:  # there was no target before
        weight = config.entropy_coefficient
    elif entropy is not None:
        weight += config.entropy_coefficient_delta if is_low else -config.entropy_coefficient_delta
        weight = min(max(weight, config.entropy_coefficient_min), config.entropy_coefficient_max)
    return weight, weight if is_low else 0.0
