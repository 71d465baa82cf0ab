"""layout_check: whether a model reads a group of rollouts as it reads each of them alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo.update.batch import Rollouts, made_up_pair
from grpo.update.layout import longest_pair
from grpo.update.network import Network

Compared = tuple[float, bool]  # a difference between two layouts, and whether it is rounding


def check_layouts(
    networks: Mapping[str, Network],
    rollouts: Rollouts,
    lengths: tuple[int, int],
    last: str | None,
    of_reference: dict[tuple[int, int], Compared],
) -> dict[str, Any]:
    """See Learner.check_layout(); of_reference: the differences that were found before, by their lengths."""
    found: dict[str, Any] = {}
    for name, network in networks.items():
        if network.best == "rows":
            continue
        network.use(network.best)
        vocabulary = int(network.model.config.get_text_config(decoder=True).vocab_size)
        # Made up: in float32, which shows most. The rollouts: as they are read.
        made_up = (made_up_pair(*lengths, vocabulary), np.arange(2), not network.is_narrow)
        if name == "policy":
            own = [(rollouts, longest_pair(rollouts), False)] if len(rollouts) else []
            pairs = [] if last == network.best else [made_up, *own]
            compared = [compare(network, *pair) for pair in pairs]
        else:
            if lengths not in of_reference:
                of_reference[lengths] = compare(network, *made_up)
            compared = [of_reference[lengths]]
        found[f"{name}_layout_difference"] = max((difference for difference, _ in compared), default=None)
        if not all(fits for _, fits in compared):
            found[f"{name}_layout_refused"] = network.best
            network.use("rows")
    return found


def compare(network: Network, rollouts: Rollouts, rows: np.ndarray, exactly: bool) -> Compared:
    """Network.difference(), and whether it is rounding."""
    difference = network.difference(rollouts, rows, exactly=exactly)
    return difference, difference <= network.tolerance(exactly=exactly)  # NaN is not
