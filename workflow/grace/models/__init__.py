"""Loading and building the vision-language models, and naming their parts the same way for every family."""

from grace.models.build import build_llava
from grace.models.load import load_model, load_processor, model_folder
from grace.models.modules import (
    decoder,
    decoder_linears,
    forward_inputs,
    freeze_vision,
    head_weight,
    image_token_id,
    output_head,
    vision_tower,
    vocabulary,
)

__all__ = [
    "build_llava",
    "decoder",
    "decoder_linears",
    "forward_inputs",
    "freeze_vision",
    "head_weight",
    "image_token_id",
    "load_model",
    "load_processor",
    "model_folder",
    "output_head",
    "vision_tower",
    "vocabulary",
]
