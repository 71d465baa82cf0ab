"""parallel: a torch.distributed group in which each process computes a share of every optimiser step.

Denominators are the whole step's, so gradients and numbers of the shares are added, not averaged.
"""

from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def share() -> tuple[int, int]:
    """(rank, world size): which share of a step is this process's."""
    return (distributed.get_rank(), distributed.get_world_size()) if _is_shared() else (0, 1)


def _is_shared() -> bool:
    # vLLM in this process makes a group of one, in which nothing may be other than without it.
    return distributed.is_initialized() and distributed.get_world_size() > 1


def add_up_gradients(model: torch.nn.Module) -> None:
    """Give every process the sum of their gradients."""
    if not _is_shared():
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # this share did not need it
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def gathered(value: T) -> list[T]:
    """`value` of every process; without a group, of this one alone."""
    if not _is_shared():
        return [value]
    parts = [value] * distributed.get_world_size()
    distributed.all_gather_object(parts, value)
    return parts
