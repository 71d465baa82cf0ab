"""sharding: weights, gradients and moments of a model, a part of each in every process (FSDP2).

Each decoder layer is gathered when it computes; the rest (embeddings, last norm, head: tied weights stay
together) with the reader that holds it all. Gradients are added up, not averaged: denominators are the whole
step's. Of several replicas each is shared out among its own processes; gradients are added up over all.
"""

import copy
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.errors import UsageError


def mesh_of(device: str, world: int, replicas: int) -> DeviceMesh:
    """Of `world` processes: all share out one copy of the weights, or each of `replicas` rows of them one."""
    if replicas == 1:
        return init_device_mesh(device, (world,))
    return init_device_mesh(device, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


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
    register_fsdp_forward_method(reader, "ask")


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


def gather(tensors: Mapping[str, Tensor], kept: Collection[str]) -> dict[str, Tensor]:
    """Those called `kept` whole, in main memory; all are gathered, one after another."""
    found = {}
    for name, tensor in tensors.items():
        whole = full(tensor.detach())
        if name in kept:
            found[name] = whole.to("cpu", copy=whole is tensor)
        del whole
    return found


def local(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(parameter: Tensor) -> Any:
    """The index of what this process has of it."""
    if not isinstance(parameter, DTensor):
        return ...
    sizes, starts = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def placed(whole: Any, parameter: Tensor) -> Tensor:
    """A copy of `whole` where and as `parameter` is: a part of it, where it is of the parameter's shape.

    whole: a tensor, or what a file has of one, of which no more is read than that.
    """
    shape = whole.shape if isinstance(whole, Tensor) else torch.Size(whole.get_shape())
    if isinstance(parameter, DTensor) and shape == parameter.shape:
        part = whole[part_of(parameter)].to(parameter.device, copy=True)
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(part, mesh, placements, shape=shape, stride=parameter.stride())
    copied: Tensor = whole[...].to(parameter.device, copy=True)
    return copied


@torch.no_grad()
def put(parameter: Tensor, whole: Any) -> Tensor:
    """Copy `whole`, likewise, into `parameter`, in place; gives what this process has of it."""
    return local(parameter).copy_(whole[part_of(parameter)])


@torch.no_grad()
def materialize(reader: nn.Module, device: str) -> None:
    """Zeros for what this process has of a model that was shared out on the meta device."""
    reader.to_empty(device=device)
    for parameter in reader.parameters():
        local(parameter).zero_()


class Skeleton:
    """The modules of a model as they were before their weights were shared out, and none of these weights."""

    def __init__(self, model: nn.Module) -> None:
        self._empty = {
            name: nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
            for name, weight in model.named_parameters()
        }
        memo = {id(weight): self._empty[name] for name, weight in model.named_parameters()}
        self.model: Any = copy.deepcopy(model, memo)

    def attend(self, attention: str) -> None:
        """Have the attention that was found for the model once its weights were there."""
        self.model.set_attn_implementation(attention)

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
