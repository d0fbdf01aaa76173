"""The parts of a vision-language model that the method touches, for every family alike."""

from typing import Any

import torch
from torch import nn

from grace.families import family_of
from grace.families.base import DECODER, LAYERS


def decoder(model: nn.Module) -> Any:
    """The language model without its head: a stack of decoder layers that ends in a norm."""
    return model.get_submodule(DECODER)


def output_head(model: Any) -> nn.Linear:
    """The projection from the last hidden state to the vocabulary; weight [rows, d], rows that only pad included."""
    return model.get_output_embeddings()


def vocabulary(processor: Any) -> int:
    """V: one more than the largest id that the tokenizer can give. A head's rows from V on only pad it."""
    tokenizer = processor.tokenizer
    return max(len(tokenizer), 1 + max(tokenizer.added_tokens_decoder, default=0))


def head_weight(model: nn.Module, size: int) -> torch.Tensor:
    """The head's first `size` rows [V, d]: no logit, gate, sample or gradient comes from rows that only pad it."""
    weight = output_head(model).weight
    return weight if len(weight) == size else weight[:size]


def image_token_id(model: Any) -> int:
    """The id that stands for one visual token in `input_ids`."""
    return model.config.image_token_id


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that GRACE quantises (q, k, v, o, gate, up, down of every decoder layer), by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{LAYERS}.")
    }


def freeze_vision(model: nn.Module) -> None:
    """Stop gradients to the vision tower; what projects into the decoder, the decoder and the head stay trainable."""
    family = family_of(model)
    for name, parameter in model.get_submodule(family.tower).named_parameters():
        if name.split(".")[0] not in family.trained:
            parameter.requires_grad_(False)


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The vision tower where its output may be kept (LLaVA); None for Qwen, whose merger is part of it and trained."""
    return family_of(model).vision_tower(model)


def forward_inputs(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pixels: dict[str, torch.Tensor],
    packed: Any | None = None,
) -> dict[str, Any]:
    """What the forward takes of a batch, on the model's device and images in its dtype.

    Args:
        input_ids, attention_mask: int64 [batch, tokens].
        pixels: what the image processor gives for the batch's images, in order; empty where it has none.
        packed: a `PackedRow` of the batch, for a model that `use_packed_attention` has prepared.
    """
    parameter = next(model.parameters())

    def here(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None, non_blocking=True)

    ids = here(input_ids if packed is None else packed.input_ids)
    images = family_of(model).image_inputs(model, ids, {name: here(value) for name, value in pixels.items()})
    if packed is None:
        return {"input_ids": ids, "attention_mask": here(attention_mask), **images}
    sequences = {"packed_offsets": here(packed.offsets), "packed_longest": packed.longest}
    return {"input_ids": ids, "position_ids": here(packed.position_ids), **sequences, **images}
