"""Fewer, larger GEMMs: q, k and v as one, gate and up as one.

The three (or two) linears read the same activations one after the other in every Llama-type layer, whatever happens
between them (rotary embeddings, norms of queries and keys). So the first of them computes all the outputs and leaves
the others' share for them to pick up, and the layers' own code stays as transformers wrote it. Inference only.
"""

from typing import Any

import torch
from torch import nn

from grace.families.base import READERS

JOINED = {parts[0].partition(".")[0]: tuple(part.partition(".")[2] for part in parts) for parts in READERS.values()}
"""The linears that are multiplied as one, by the part of a layer that they lie in."""


class Share(nn.Module):
    """Stands in for a linear whose outputs an earlier one has already computed."""

    def __init__(self) -> None:
        super().__init__()
        self.ready: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hand over the outputs [..., out]; `x` was multiplied by the first linear of the group."""
        ready, self.ready = self.ready, None
        assert ready is not None, "the group's first linear comes before its others"
        return ready


class Fused(nn.Module):
    """The first linear of a group: multiplies by all their weights at once.

    Args:
        linear: the stacked weights, sum(sizes) outputs.
        sizes: outputs of each linear of the group, this one's first.
        shares: what stands in for the others, in the order of `sizes[1:]`.
    """

    def __init__(self, linear: nn.Module, sizes: list[int], shares: list[Share]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, sizes
        self._shares = shares  # a plain list: the modules are registered where they stand in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> the first linear's outputs [..., sizes[0]]."""
        own, *others = self.linear(x).split(self.sizes, dim=-1)
        for share, output in zip(self._shares, others, strict=True):
            share.ready = output
        return own


def install(parent: nn.Module, names: tuple[str, ...], linear: nn.Module, sizes: list[int]) -> None:
    """Put `linear` in the place of `parent`'s linears `names`, whose outputs it computes together."""
    shares = [Share() for _ in names[1:]]
    setattr(parent, names[0], Fused(linear, sizes, shares))
    for name, share in zip(names[1:], shares, strict=True):
        setattr(parent, name, share)


def stack(linears: list[nn.Linear]) -> nn.Linear:
    """Dense linears over the same inputs as one, their outputs one after the other."""
    first = linears[0]
    with torch.device("meta"):
        fused = nn.Linear(
            first.in_features, sum(linear.out_features for linear in linears), bias=first.bias is not None
        )
    fused.weight = nn.Parameter(torch.cat([linear.weight.data for linear in linears]), requires_grad=False)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([linear.bias.data for linear in linears]), requires_grad=False)
    return fused


def fuse_dense(decoder: Any) -> None:
    """Fuse the dense linears of every layer of `decoder` in place; layers of another shape are left alone."""
    for layer in decoder.layers:
        for part, names in JOINED.items():
            parent = getattr(layer, part, None)
            linears = [each for name in names if isinstance(each := getattr(parent, name, None), nn.Linear)]
            if parent is not None and len(linears) == len(names):
                install(parent, names, stack(linears), [linear.out_features for linear in linears])
