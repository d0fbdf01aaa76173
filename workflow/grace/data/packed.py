"""Models near the hardware's limit: packed rows, compiled decoder layers, and activations kept as memory allows."""

import torch
from torch import nn

from grace.data.batches import Batch
from grace.data.packing import PackedRow, pack_row
from grace.families import family_of
from grace.models import decoder, image_token_id
from grace.models.packed_attention import use_packed_attention


def prepare_packed(model: nn.Module, kept_activations: float, device: torch.device) -> None:
    """Make a model take packed rows and, on a GPU, compile its decoder's layers, each once for all of them.

    Args:
        kept_activations: share (0 to 1) of a compiled layer's activations that its backward pass finds in memory; the
            rest is computed again, the cheapest first. At 0 only the layers' inputs are kept.
    """
    use_packed_attention(model)
    if device.type != "cuda":
        return
    import torch._functorch.config as functorch

    functorch.activation_memory_budget = kept_activations
    for layer in decoder(model).layers:
        # without the hooks around it, which are FSDP's; from the class, so that a second call compiles nothing twice
        layer.forward = torch.compile(type(layer).forward.__get__(layer))


def packed_row(model: nn.Module, batch: Batch, capacity: int) -> PackedRow:
    """The batch's tokens laid end to end in a row of `capacity`,
    with the positions that the model's family gives them.
    """
    positions = family_of(model).positions(model, batch.input_ids, batch.attention_mask, batch.pixels)
    pad = int(image_token_id(model) == 0)  # any token but an image's: the padding is never read
    return pack_row(batch.input_ids, batch.attention_mask, positions, pad, capacity)
