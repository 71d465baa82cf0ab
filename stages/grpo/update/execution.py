"""execution: what an update's bits depend on beside its inputs, and a digest of the weights that it made.

Another number of threads adds up in another order: recorded with an update, in no fingerprint, so that a
replay computes as it did.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from grpo.update.learner import Learner

_COLUMNS = 4096


def execution_of(learner: "Learner") -> dict[str, Any]:
    """How the learner computes, as plain data (artifacts/recorded.py).

    `exact`: the same again gives the same bits. On a GPU backward passes add with atomics in any order.
    """
    config, on_cpu = learner.config, learner.device == "cpu"
    return {
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": 1 if learner.ranks is None else learner.ranks.world,
        "replicas": 1 if learner.ranks is None else learner.ranks.replicas,
        "torch": torch.__version__,
        "max_tokens_per_batch": config.max_tokens_per_batch,
        "gradient_checkpointing": config.gradient_checkpointing,
        "prompt_sharing": config.prompt_sharing,
        "layouts": learner.layouts,
        "determinism": "exact" if on_cpu else "checked",
    }


def weights_digest(model: nn.Module, full: Callable[[Tensor], Tensor] = Tensor.detach) -> str:
    """Digest of all that trains in `model`, by name: any bit that changes, or two that swap, change it.

    full: gives a tensor of which the model has a part. Of each tensor the sums of its rows and columns are
    hashed, as whole numbers: a third of the time that hashing all of it takes, and on a GPU no copy of it.
    """
    whole = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
            for part in _folded(full(parameter.detach())):
                whole.update(part.cpu().numpy().data)
    return whole.hexdigest()


def _folded(tensor: Tensor) -> tuple[Tensor, ...]:
    """Sums over the columns and over the rows of its bytes as int64, which wrap around; and what is over."""
    values = tensor.contiguous().flatten().view(torch.uint8)
    values = values.clone() if values.storage_offset() % 8 else values  # part of a larger one
    size = 8 * _COLUMNS
    even = len(values) // size * size
    grid = values[:even].view(torch.int64).view(-1, _COLUMNS)
    return grid.sum(0), grid.sum(1), values[even:]
