"""sharding: weights, gradients and moments of a model, a part of each in every process (FSDP2).

Each decoder layer is gathered when it computes; the rest (embeddings, last norm, head: tied weights stay
together) with the reader that holds it all. Gradients are added up, not averaged: denominators are the whole
step's.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.errors import UsageError


def shard(reader: nn.Module, mesh: DeviceMesh) -> None:
    """Leave a part of each parameter in this process, in place. Raises UsageError (exit 2) without layers."""
    layers = _layers(reader)
    if not layers:
        raise UsageError("update: this model has no decoder layers that several processes can share; use one")
    # FSDP2 hangs its hooks on what comes out: nothing may be done to that in place, and nothing is.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in (*layers, reader):
        # The last group too is dropped after its forward: else reads without a backward would leave whole
        # weights behind, which no step changes.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in reader.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # of other factors gloo has no reduction


def gather_in(reader: nn.Module, dtype: torch.dtype) -> None:
    """Gather decoder layers in `dtype` from now on, float32 or bfloat16; gradients are added up in float32.

    The rest stays float32: what is between layers, the last norm and the head compute as in one process. Not
    while gradients are to be computed of what was read before.
    """
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for layer in _layers(reader):
        # torch takes a policy when a module is sharded and offers no way to change it: a weight check reads
        # in float32, and a replay in the precision of its update.
        group = layer._get_fsdp_state()._fsdp_param_group
        group.mp_policy = policy
        group._init_mp_dtypes()
        for parameter in group.fsdp_params:
            parameter.all_gather_outputs = []  # of the other type
            if hasattr(parameter, "_unsharded_param"):
                del parameter._unsharded_param


def _layers(reader: nn.Module) -> list[Any]:
    return [module for module in reader.modules() if isinstance(module, GradientCheckpointingLayer)]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor in every process, which all must ask for in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(whole: Tensor, parameter: Tensor) -> Tensor:
    """A copy of `whole` where and as `parameter` is: a part of it, where it is of the parameter's shape."""
    if isinstance(parameter, DTensor) and whole.shape == parameter.shape:
        mesh, placements = parameter.device_mesh, parameter.placements
        # From what each process has itself: nothing is sent.
        part = distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)
        return DTensor.from_local(
            part.to_local().clone(), mesh, placements, shape=part.shape, stride=part.stride()
        )
    return whole.to(parameter.device, copy=True)


@torch.no_grad()
def put(parameter: Tensor, whole: Tensor) -> None:
    """Copy `whole` into `parameter`, in place."""
    parameter.copy_(placed(whole, parameter))


class Skeleton:
    """The modules of a model as they were before their weights were shared out, and none of these weights."""

    def __init__(self, model: nn.Module) -> None:
        self._empty = {
            name: nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
            for name, weight in model.named_parameters()
        }
        memo = {id(weight): self._empty[name] for name, weight in model.named_parameters()}
        self.model: Any = copy.deepcopy(model, memo)

    def holding(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A model with these very tensors as its parameters, by name, and their values in its buffers."""
        memo = {
            id(empty): nn.Parameter(tensors[name], requires_grad=empty.requires_grad)
            for name, empty in self._empty.items()
        }
        model: nn.Module = copy.deepcopy(self.model, memo)
        for name, buffer in model.named_buffers():
            buffer.copy_(tensors[name])
        return model
