"""Loading and building the vision-language models, and naming their parts the same way for every family."""

from grace.models.build import build_llava
from grace.models.load import load_model, load_processor, model_folder
from grace.models.parts import (
    decoder,
    decoder_linears,
    freeze_vision,
    image_inputs,
    image_token_id,
    output_head,
    vision_tower,
)

__all__ = [
    "build_llava",
    "decoder",
    "decoder_linears",
    "freeze_vision",
    "image_inputs",
    "image_token_id",
    "load_model",
    "load_processor",
    "model_folder",
    "output_head",
    "vision_tower",
]
