"""The parts of a vision-language model that the method touches, for LLaVA, Qwen2-VL and Qwen3-VL alike.

All three keep their decoder at `model.model.language_model` and their vocabulary projection at the output
embeddings; they differ in where the vision side sits and what it is called.
"""

from torch import nn

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
