"""The parts of a vision-language model that the method touches, for LLaVA, Qwen2-VL and Qwen3-VL alike.

All three keep their decoder at `model.model.language_model` and their vocabulary projection at the output
embeddings; they differ in where the vision side sits and what it is called.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

_VISION = ("vision_tower", "visual")


def decoder(model: nn.Module) -> nn.Module:
    """The language model without its head: a stack of decoder layers that ends in a norm."""
    return model.model.language_model


def output_head(model: nn.Module) -> nn.Linear:
    """The projection from the last hidden state to the vocabulary; weight [vocab, d]."""
    return model.get_output_embeddings()


def image_token_id(model: nn.Module) -> int:
    """The id that stands for one visual token in `input_ids`."""
    return model.config.image_token_id


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that GRACE quantises (q, k, v, o, gate, up, down of every decoder layer), by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".language_model.layers." in f".{name}"
    }


def freeze_vision(model: nn.Module) -> None:
    """Stop gradients to the vision tower; projector, decoder and head stay trainable."""
    for name, parameter in model.model.named_parameters():
        if name.split(".")[0] in _VISION and ".merger" not in name and ".deepstack" not in name:
            parameter.requires_grad_(False)


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The vision tower where it is apart from the projector (LLaVA); None for Qwen, whose merger is part of it."""
    return getattr(model.model, "vision_tower", None)


def image_inputs(model: nn.Module, pixels: dict[str, torch.Tensor]) -> dict:
    """What the forward takes of a batch's images, on the model's device and in its dtype.

    Kept tower features (`vision_features`, fp32 [batch, n, d]) go through the projector here, so that the forward
    need not run the tower.
    """
    parameter = next(model.parameters())
    pixels = {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None, non_blocking=True)
        for name, value in pixels.items()
    }
    if "vision_features" not in pixels:
        return pixels
    projected = list(model.model.multi_modal_projector(pixels["vision_features"]))
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=projected)}}
