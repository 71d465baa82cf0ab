"""optimizer: AdamW, from torch or with its moments in 8 bits, and its state as plain tensors.

What is on disk is what is in memory, so that a process that resumes takes the same steps. In 8 bits it is
that of bitsandbytes: torchao, once installed, is imported with transformers, and would slow every command.
"""

import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config import UpdateConfig
from grpo.errors import UsageError

_ADAMW = ("step", "exp_avg", "exp_avg_sq")
_SMALL = ("step", "state1", "state2")  # the two moments; float32 below 4,096 values
_IN_8_BITS = (*_SMALL, "qmap1", "qmap2", "absmax1", "absmax2")


@contextmanager
def quiet() -> Iterator[None]:
    """Log errors alone: bitsandbytes, which peft looks for too, warns of kernels that are not used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def require_optimizer(config: UpdateConfig) -> None:
    """Raise UsageError (exit 2) where its library cannot be imported."""
    if config.optimizer == "adamw":
        return
    try:
        with quiet():
            importlib.import_module("bitsandbytes")
    except ImportError as error:
        message = f"update.optimizer: {config.optimizer}: bitsandbytes cannot be imported: {error}"
        raise UsageError(f"{message}; pip install 'grpo-stages[8bit]'") from error


def make_optimizer(config: UpdateConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimiser of what trains. Raises UsageError (exit 2) as require_optimizer does."""
    values, settings = [p for p in parameters if p.requires_grad], settings_of(config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(values, **settings, fused=True)
    require_optimizer(config)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(values, **settings)
    return optimizer


def settings_of(config: UpdateConfig) -> dict[str, Any]:
    """What both optimisers call their settings."""
    return {
        "lr": config.learning_rate,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of one parameter as tensors; bitsandbytes counts its steps in an int."""
    return {name: torch.as_tensor(value) for name, value in state.items()}


def names_of(optimizer: torch.optim.Optimizer, parameter: str, held: Iterable[str]) -> tuple[str, ...]:
    """The names of tensors_of() that a file with the names `held`, `<name>.<parameter>`, should have."""
    if isinstance(optimizer, torch.optim.AdamW):
        return _ADAMW
    return _IN_8_BITS if f"{_IN_8_BITS[-1]}.{parameter}" in held else _SMALL


def state_of(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state that tensors_of() was made of."""
    counts = isinstance(optimizer, torch.optim.AdamW)
    return {**tensors, "step": tensors["step"] if counts else int(tensors["step"].item())}


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Those of all parameters' states, by the parameter's place and their name; no copies."""
    return {
        f"{place}.{name}": value
        for place, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
