"""parallel: a torch.distributed group in which each process computes a share of every optimiser step.

Without such a group, everything here is what one process does. Denominators are the whole step's, so
gradients and numbers of the shares are added, not averaged.
"""

import numpy as np
import torch
from torch import distributed

from grpo.update.objective import Sums


def share() -> tuple[int, int]:
    """(rank, world size): which share of a step is this process's."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def add_up_gradients(model: torch.nn.Module) -> None:
    """Give every process the sum of their gradients."""
    if not distributed.is_initialized():
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # this share did not need it
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def exchange(found: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """What all processes found, by row: shares of another cut need other rows."""
    if not distributed.is_initialized():
        return found
    parts: list[dict[int, np.ndarray]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(parts, found)
    return {row: values for part in parts for row, values in part.items()}


def total(sums: Sums) -> Sums:
    """The sums of all processes."""
    if not distributed.is_initialized():
        return sums
    parts = [Sums()] * distributed.get_world_size()
    distributed.all_gather_object(parts, sums)
    whole = Sums()
    for part in parts:
        whole.add(part)
    return whole
