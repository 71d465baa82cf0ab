"""working_copy: bfloat16 copies of a model's weights, with which it computes; AdamW changes the float32 ones.

No product, norm or residual is cast then: 18 bytes a parameter instead of 16, and half the traffic of what is
between products. Gradients come in bfloat16 and are added up in float32, over micro-batches of any number.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

DTYPE = torch.bfloat16


class WorkingCopy:
    """Of all floating-point weights of `model`, whose own stay float32, in the optimiser and on disk."""

    def __init__(self, model: nn.Module) -> None:
        masters = [p for p in model.parameters() if p.is_floating_point()]  # tied ones come once
        self._pairs = [(master, _copy_of(master)) for master in masters]
        copies = {id(master): copy for master, copy in self._pairs}
        self._places = [
            (module, name, parameter, copies[id(parameter)])
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in copies
        ]

        self.is_in_place = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights again: they have changed, or the copy was dropped."""
        for master, copy in self._pairs:
            if copy.shape == master.shape:
                copy.copy_(master)
            else:
                copy.data = master.to(DTYPE)

    def drop(self) -> None:
        """Free its memory until refresh(), which makes it again from the weights."""
        for _, copy in self._pairs:
            copy.data = copy.new_empty(0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the modules of the model have the copies."""
        for module, name, _, copy in self._places:
            module._parameters[name] = copy
        self.is_in_place = True
        try:
            yield
        finally:
            self.is_in_place = False
            for module, name, master, _ in self._places:
                module._parameters[name] = master


@torch.no_grad()
def narrow(model: nn.Module, *, whole: bool) -> None:
    """Round the weights of a frozen `model` to bfloat16 in place; not `whole`: those that autocast rounds.

    These are the matrices of linear modules: embeddings and norms are used in float32 under autocast too, and
    the output head's bias is.
    """
    linear = nn.Linear | Conv1D
    others = [module for module in model.modules() if not isinstance(module, linear)]
    kept = {id(p) for module in others for p in module.parameters(recurse=False)}
    for parameter in model.parameters():
        rounded = parameter.ndim > 1 and id(parameter) not in kept
        if parameter.is_floating_point() and (whole or rounded):
            parameter.data = parameter.data.to(DTYPE)


def _copy_of(master: nn.Parameter) -> nn.Parameter:
    copy = nn.Parameter(master.detach().to(DTYPE), requires_grad=master.requires_grad)
    if copy.requires_grad:
        copy.register_post_accumulate_grad_hook(_adding_up_in(master))  # type: ignore[no-untyped-call]
    return copy


def _adding_up_in(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that adds a copy's gradient to the weight's, as soon as it is whole, and drops it."""

    def add_up(copy: Tensor) -> None:
        gradient, copy.grad = copy.grad, None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad.add_(gradient)

    return add_up
