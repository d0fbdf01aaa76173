"""Outliers of the kind that large models have, put into a small one without changing what it computes.

In every decoder layer, one channel in 32 of each RMSNorm's gains is divided by 16 and the matching columns of the
linears that read the norm are multiplied by 16. With a power of two both are exact, so the model's outputs stay, but
the weights' groups now hold columns 16 times larger than their neighbours, and rounding them to a few bits hurts.
"""

from collections.abc import MutableMapping

import torch
from torch import nn

from grace.errors import GraceError
from grace.families.base import READERS
from grace.quant.names import decoder_part


def outlier_channels(width: int, layer: int, norm: str, every: int = 32, seed: int = 0) -> torch.Tensor:
    """Sorted int64 indices of the channels of one norm that become outliers: `width / every`, at least one."""
    number = (seed * 100_003 + layer) * len(READERS) + list(READERS).index(norm)
    generator = torch.Generator().manual_seed(number)
    return torch.randperm(width, generator=generator)[: max(1, width // every)].sort().values


def with_outliers(key: str, tensor: torch.Tensor, every: int = 32, factor: float = 16.0, seed: int = 0) -> torch.Tensor:
    """`tensor` as it is after the transform, by its key in a state dict or file; untouched ones come back as they are.

    Each tensor can be transformed alone, so a checkpoint can be streamed.
    """
    part = decoder_part(key)
    if part is None or part.kind != "weight":
        return tensor
    for norm, linears in READERS.items():
        if part.part == norm:
            gain = tensor.clone()
            gain[outlier_channels(len(gain), part.layer, norm, every, seed)] /= factor
            return gain
        if part.part in linears:
            weight = tensor.clone()
            weight[:, outlier_channels(weight.shape[1], part.layer, norm, every, seed)] *= factor
            return weight
    return tensor


@torch.no_grad()
def add_outliers(
    model: nn.Module | MutableMapping[str, torch.Tensor], every: int = 32, factor: float = 16.0, seed: int = 0
) -> None:
    """Transform a model, or a state dict, in place.

    Raises:
        GraceError: it has no decoder layers that start with `input_layernorm` and `post_attention_layernorm`.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    parts = {part.part for part in map(decoder_part, state) if part}
    if not set(READERS) <= parts:
        raise GraceError("outliers: the model has no Llama-type decoder layers; leave the -outliers precisions out")
    for key, tensor in state.items():
        tensor.copy_(with_outliers(key, tensor, every, factor, seed))
