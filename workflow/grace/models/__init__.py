"""Loading and building the vision-language models, and naming their parts the same way for every family.

`grace.models.families` is read by the configuration, so this package imports torch only when one of its names is
asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {"build_llava": "build", "load_model": "load", "load_processor": "load", "model_folder": "load"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'modules')}"), name)
