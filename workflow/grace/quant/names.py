"""What the decoder's tensors are called: one name per module, whatever the checkpoint's age.

In memory every family keeps its decoder at the same place (`families.base.LAYERS`). On disk LLaVA writes
`language_model.model.layers` and Qwen2-VL `model.layers`; transformers renames them when it loads. Codes and scales
go by the name in memory, so a key on disk is matched by its layer number and part. What is packed for others to load
takes the names that published checkpoints have (`Family.published`).
"""

import re
from typing import NamedTuple

from grace.families.base import LAYERS, LINEARS

_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.((?:self_attn|mlp)\.[a-z]+_proj|[a-z_]+_?layernorm)\.(weight|bias)$")
_VISION = re.compile(r"(?:^|\.)(vision_tower|vision_model|visual)\.")


class DecoderPart(NamedTuple):
    """A tensor of a decoder layer: layer number, part such as `mlp.up_proj`, and `weight` or `bias`."""

    layer: int
    part: str
    kind: str

    @property
    def module(self) -> str:
        """The module's name in memory."""
        return f"{LAYERS}.{self.layer}.{self.part}"


def decoder_part(key: str) -> DecoderPart | None:
    """Which part of the decoder a state dict's or a file's key is; None for anything outside the decoder layers."""
    found = _KEY.search(key)
    if found is None or _VISION.search(key):
        return None
    return DecoderPart(int(found[1]), found[2], found[3])


def in_decoder_layer(key: str) -> bool:
    """Whether a file's key, of a plain or a packed tensor, lies in one of the decoder's layers."""
    return re.search(r"(?:^|\.)layers\.\d+\.", key) is not None and not _VISION.search(key)


def quantised_module(key: str) -> str | None:
    """The module name in memory where `key` is the weight of a linear that is quantised, else None."""
    part = decoder_part(key)
    return part.module if part and part.part in LINEARS and part.kind == "weight" else None
