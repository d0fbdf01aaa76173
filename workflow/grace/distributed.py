"""Several processes under torchrun: decoder layers sharded by FSDP2, everything else replicated.

The embeddings, projector, norm and head are a few per cent of the weights, and the loss reads the head's weight
directly, so they stay whole on every process and their gradients are summed by hand. Every loss is already divided
by the global batch's count, so gradients are summed, never averaged.
"""

import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from grace.models import decoder
from grace.world import World, this_world

_LONGEST = timedelta(hours=1)  # that one process may take to write a model while the others wait


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
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_LONGEST, device_id=world.device if cuda else None)
    return world


@dataclass(frozen=True)
class Sharding:
    """How decoder layers are put together and their gradients summed.

    Attributes:
        gathered: how long a layer stays whole on a process: `layer`, for its own forward and again for its own
            backward; `pass`, from its forward to its backward; `step`, for all micro-batches of an optimiser step.
            Longer costs the decoder's bf16 weights in memory and saves one of two gatherings per micro-batch, or nearly
            both.
        fp32_sums: sum gradients over the processes in fp32, twice the traffic of bf16; the sum is then rounded once.
        prefetch: layers gathered ahead of the one that computes; 0 leaves it to the host, which runs ahead of the
            device.
    """

    gathered: Literal["layer", "pass", "step"] = "layer"
    fp32_sums: bool = True
    prefetch: int = 0


def shard(model: nn.Module, world: World, sharding: Sharding = Sharding()) -> None:
    """Shard the decoder's layers over the processes, by rows, so that no quantisation group is cut.

    The model around them is wrapped too, though nothing else of it is sharded: layers under one root share their
    streams, so that one is gathered while another computes. Each on its own, they would wait for each other. It is not
    the decoder that is wrapped, whose class transformers asks when it records hidden states.
    """
    if world.size == 1:
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if sharding.fp32_sums else None)
    root: Any = model.model
    layers: list[Any] = list(decoder(model).layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=sharding.gathered == "layer")
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)  # a plain sum, which every back end has
    mine = {parameter for layer in layers for parameter in layer.parameters()}
    fully_shard(root, mesh=mesh, ignored_params={p for p in root.parameters() if p not in mine})
    # of the root, which has nothing to gather
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    if sharding.prefetch:
        for at, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(layers[at + 1 : at + 1 + sharding.prefetch])
            layer.set_modules_to_backward_prefetch(layers[max(0, at - sharding.prefetch) : at][::-1])


def keep_gathered(model: nn.Module, keep: bool) -> None:
    """Whether layers stay whole behind the next backward pass, for the micro-batch after it."""
    for layer in decoder(model).layers:
        if isinstance(layer, FSDPModule):
            layer.set_reshard_after_backward(not keep, recurse=False)


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
    shape = torch.Size((len(like), *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()  # given, as processes may hold different numbers of rows
    held = DTensor.from_local(
        part.contiguous(), like.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    return held.full_tensor()
