"""Several processes under torchrun: decoder layers sharded by FSDP2, everything else replicated.

The embeddings, projector, norm and head are a few per cent of the weights, and the loss reads the head's weight
directly, so they stay whole on every process and their gradients are summed by hand. Every loss is already divided
by the global batch's count, so gradients are summed, never averaged.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from grace.models import decoder


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the outputs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, items: list) -> list:
        """Every process's items, in the order of the ranks; all of them must call it."""
        if self.size == 1:
            return items
        parts: list[list] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def add(self, values: dict[str, float]) -> dict[str, float]:
        """Sum each value over the processes."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))


def join_world() -> World:
    """One process alone, or this process's place among those that torchrun started."""
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # a run that is killed and started again ends with the same bits: no sums in the order of arrival
        torch.use_deterministic_algorithms(True)  # only warned, flash attention would stay as it is
        torch.utils.deterministic.fill_uninitialized_memory = False
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return World(int(os.environ.get("RANK", 0)), size, device)


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
