"""residence: where the learner's tensors are while others have the accelerator: there, or in main memory.

Main memory is pinned and made once: copies from and to it run at the speed of the bus, and beside each other.
"""

from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from grpo.models.turns import may_stay
from grpo.update.optimizer import state_tensors


class Residence:
    """For the life of a learner on `device`; on a CPU nothing ever moves.

    share: of the device, that others may count on in their turn. memory: (free, total) bytes of the device.
    allocate: main memory for a tensor like the given one.
    """

    def __init__(
        self,
        device: str,
        share: float,
        memory: Callable[[], tuple[int, int]] = torch.cuda.mem_get_info,
        allocate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.device = device
        self.share = share
        self.is_away = False
        self._memory = memory
        self._allocate = allocate or _pinned
        self._places: dict[str, Tensor] = {}  # by the tensor's name

    def may_stay(self) -> bool:
        """Whether others have their share without anything leaving. What nobody holds is given back first."""
        torch.cuda.empty_cache()
        return may_stay(*self._memory(), self.share)

    def leave(self, tensors: Mapping[str, Tensor]) -> None:
        """Move them to main memory, in place: whoever holds one finds it there."""
        for name, tensor in _once(tensors).items():
            place = self._places.get(name)
            if place is None or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                place = self._places[name] = self._allocate(tensor)
            place.copy_(tensor.detach(), non_blocking=True)
            tensor.data = place
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are whole before anyone reads them
            torch.cuda.empty_cache()
        self.is_away = True

    def arrive(self, tensors: Mapping[str, Tensor]) -> None:
        """Move back what left. Its main memory stays, for the next time."""
        for tensor in _once(tensors).values():
            here = torch.empty_like(tensor, device=self.device)
            tensor.data = here.copy_(tensor.detach(), non_blocking=True)
        self.is_away = False


def tensors_of(models: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Weights, buffers and moments by their names: all that stays between steps."""
    found = {
        f"{name}.{key}": tensor
        for name, model in models.items()
        for key, tensor in chain(model.named_parameters(), model.named_buffers())
    }
    return found | (state_tensors(optimizer) if optimizer is not None else {})


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under its first name: several parameters may share one of an optimiser's tables."""
    seen: dict[int, str] = {}
    return {name: tensor for name, tensor in tensors.items() if seen.setdefault(id(tensor), name) == name}


def _pinned(like: Tensor) -> Tensor:
    return torch.empty_like(like, device="cpu", pin_memory=True)
