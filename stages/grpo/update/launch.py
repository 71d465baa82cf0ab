"""launch: the processes that torchrun started -> a group, and what a group cannot do yet."""

import os

import torch
from torch import distributed

from grpo.config import UpdateConfig
from grpo.errors import UsageError
from grpo.models.loading import best_device
from grpo.update.parallel import PATIENCE, Ranks

REPLICAS = "GRPO_REPLICAS"
"""The variable that says what `execution.learner.replicas` does, where torchrun starts the processes."""


def open_ranks() -> Ranks:
    """The group of torchrun's environment; each of its processes asks for it, and waits for the others.

    Raises UsageError (exit 2) where a machine has fewer GPUs than processes, and for replicas that do not
    divide them.
    """
    device = best_device()
    if device == "cuda":
        own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= count:
            raise UsageError(f"torchrun --nproc-per-node: a process for each GPU is right; here are {count}")
        torch.cuda.set_device(own)
    store, rank, world = next(distributed.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    return Ranks(store, rank, world, device, replicas=_replicas(world))


def _replicas(world: int) -> int:
    """Asked of the environment: before rank 0 leads, the others have no configuration."""
    text = os.environ.get(REPLICAS, "1")
    if not (text.isdecimal() and int(text) and world % int(text) == 0):
        raise UsageError(f"{REPLICAS}: found {text}; right is what divides the {world} processes of torchrun")
    return int(text)


def refuse(config: UpdateConfig) -> None:
    """Raise UsageError (exit 2) for what several processes cannot train with yet."""
    if config.weights != "float32":
        raise UsageError(
            f"update.weights: {config.weights}: several processes compute with parts of the float32 weights;"
            " set weights: float32, or start one process"
        )
    if config.optimizer != "adamw":
        raise UsageError(
            f"update.optimizer: {config.optimizer}: its blocks of 8-bit values cannot be shared out; set"
            " optimizer: adamw, or start one process"
        )
