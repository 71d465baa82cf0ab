"""optimizer: AdamW, from torch or with its moments in 8 bits, and its state as plain tensors.

What is on disk is what is in memory, so that a process that resumes takes the same steps.
"""

import importlib
import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config import UpdateConfig
from grpo.errors import EngineError

MOMENTS = ("exp_avg", "exp_avg_sq")
PACKED = ("codes", "scale", "qmap")  # what a moment in 8 bits consists of; small ones stay in float32


def require_optimizer(config: UpdateConfig) -> None:
    """Raise EngineError (exit 8) where its library cannot be imported."""
    if config.optimizer == "adamw":
        return
    try:
        logging.disable(logging.WARNING)  # of kernels that are not for this machine; none of them is used
        importlib.import_module("torchao.optim")
    except ImportError as error:
        message = f"update.optimizer: {config.optimizer}: torchao cannot be imported: {error}"
        raise EngineError(f"{message}; pip install 'grpo-stages[8bit]'") from error
    finally:
        logging.disable(logging.NOTSET)


def make_optimizer(config: UpdateConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimiser of `parameters`. Raises EngineError (exit 8) as require_optimizer does."""
    betas, values = (config.betas[0], config.betas[1]), [p for p in parameters if p.requires_grad]
    rate, epsilon, decay = config.learning_rate, config.adam_epsilon, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(values, rate, betas, epsilon, decay, fused=True)
    require_optimizer(config)
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(values, rate, betas, epsilon, decay)
    return optimizer


def take_step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One step. torchao compiles it: on a GPU, where that saves memory; on a CPU it would need a compiler."""
    [group] = optimizer.param_groups
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(learning_rate)
    else:
        group["lr"] = learning_rate
    on_gpu = group["params"][0].is_cuda
    with nullcontext() if on_gpu else torch.compiler.set_stance("force_eager"):
        optimizer.step()


def tensors_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of one parameter as plain tensors: `step`, and `exp_avg` or its PACKED parts."""
    found = {"step": state["step"]}
    for moment in MOMENTS:
        value: Any = state[moment]
        packed = hasattr(value, PACKED[0])
        found |= {f"{moment}_{part}": getattr(value, part) for part in PACKED} if packed else {moment: value}
    return found


def names_of(is_packed: bool) -> list[str]:
    """The names of tensors_of(), of a parameter whose moments are in 8 bits or are not."""
    parts = [f"_{part}" for part in PACKED] if is_packed else [""]
    return ["step", *(f"{moment}{part}" for moment in MOMENTS for part in parts)]


def state_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state that tensors_of() was made of."""
    found: dict[str, Any] = {"step": tensors["step"]}
    for moment in MOMENTS:
        if moment in tensors:
            found[moment] = tensors[moment]
            continue
        from torchao.optim.subclass_8bit import OptimState8bit

        parts = [tensors[f"{moment}_{part}"] for part in PACKED]
        found[moment] = OptimState8bit(*parts, moment == "exp_avg", torch.float32)
    return found
