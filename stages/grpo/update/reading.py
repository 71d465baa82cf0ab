"""reading: log-probs of rollouts under a model, and the micro-batches in which a process reads them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from grpo.update.batch import Rollouts, room_for
from grpo.update.layout import ByRow, MicroBatch, by_row, plan
from grpo.update.network import Network

if TYPE_CHECKING:
    from grpo.update.learner import Learner


def micro_batches(
    learner: "Learner", network: Network, rollouts: Rollouts, rows: np.ndarray
) -> Iterator[MicroBatch | None]:
    """Those of `rows` that this process reads; then None, as often as others read on without it."""
    ranks, most = learner.ranks, learner.config.max_tokens_per_batch
    share = (0, 1) if ranks is None else (ranks.rank, ranks.world)
    planned = plan(rollouts, rows, most, network.layout, network.cost, share)
    others = 0 if ranks is None else ranks.most(len(planned))
    for sequences in planned:
        yield network.batch(rollouts, sequences)
    yield from [None] * (others - len(planned))


@torch.no_grad()
def read(
    learner: "Learner", network: Network, rollouts: Rollouts, rows: np.ndarray, *, with_entropy: bool = False
) -> tuple[ByRow, ByRow]:
    """Log-probs, and entropies where asked for, of all `rows`; of several processes on rank 0 alone."""
    rooms = room_for(rollouts, rows), room_for(rollouts, rows if with_entropy else rows[:0])
    found: tuple[ByRow, ByRow] = ({}, {})
    for batch in micro_batches(learner, network, rollouts, rows):
        if batch is None:
            network.take_part()
            continue
        values = network.logprobs(batch, with_entropy=with_entropy)
        for known, values_N, room in zip(found, values, rooms, strict=True):
            known.update(by_row(batch, values_N, room) if values_N is not None else {})
    parts = [found] if learner.ranks is None else learner.ranks.to_first(found)
    logprobs, entropies = ({row: x for part in parts for row, x in part[n].items()} for n in (0, 1))
    return logprobs, entropies
