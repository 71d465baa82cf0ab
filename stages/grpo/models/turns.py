"""turns: one accelerator, on which learner, engine and reward models work in turn; numbers alone, no torch.

Who has the turn may count on a share of the memory; who waits stays there as long as that leaves room.
"""

from collections.abc import Mapping
from typing import Any

SHARE = 0.85  # of the device: an engine's weights, caches and CUDA graph pool
SPARE_BYTES = 2**31  # of what is free; vLLM refuses to open where its share is not


def share_of(engine_options: Mapping[str, Any]) -> float:
    """The share that whoever samples may take: gpu_memory_utilization, where it is given and a number."""
    given = engine_options.get("gpu_memory_utilization", SHARE)
    return float(given) if isinstance(given, int | float) else SHARE


def may_stay(free: int, total: int, share: float) -> bool:
    """Whether what stays on a device of `total` bytes, `free` of them beside it, leaves others their share.

    `free` is measured while the others are away and between two steps of the learner: then it holds weights,
    moments and the reference, and neither gradients nor activations.
    """
    return free - SPARE_BYTES >= share * total
