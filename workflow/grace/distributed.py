"""Several processes under torchrun: decoder layers sharded by FSDP2, everything else replicated.

The embeddings, projector, norm and head are a few per cent of the weights, and the loss reads the head's weight
directly, so they stay whole on every process and their gradients are summed by hand. Every loss is already divided
by the global batch's count, so gradients are summed, never averaged.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from grace.models import decoder
from grace.world import World, this_world


def join_world() -> World:
    """This process's place among those that torchrun started, with its GPU and, where there are others, its group."""
    world = this_world()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.device)
        # a run that is killed and started again ends with the same bits: no sums in the order of arrival
        torch.use_deterministic_algorithms(True)  # only warned, flash attention would stay as it is
        cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False  # a property that its stub lacks
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=world.device if cuda else None)
    return world


def shard(model: nn.Module, world: World) -> None:
    """Shard the decoder's layers over the processes, by rows, so that no quantisation group is cut."""
    if world.size == 1:
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in decoder(model).layers:
        fully_shard(layer, mesh=mesh)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)  # a plain sum, which every back end has


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from every process's part; all of them must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_rows(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows that every process holds its part of, put together; `like` is the parameter that they belong to."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part.contiguous(), like.device_mesh, [Shard(0)], run_check=False).full_tensor()
