"""What a family of models has to say about itself. No torch in here: the configuration reads names and templates."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


DECODER = "model.language_model"
"""Where every family keeps its decoder in memory: a stack `layers` and a norm."""
LAYERS = f"{DECODER}.layers"
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""In a decoder layer, the linears that read each norm's output."""
LINEARS = (
    *READERS["input_layernorm"], "self_attn.o_proj", *READERS["post_attention_layernorm"], "mlp.down_proj",
)  # fmt: skip
"""The linears of a decoder layer, which GRACE quantises."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: everything that differs between vision-language models, and nothing else.

    Attributes:
        name: `model_type` in config.json.
        processor: name of the processor's class.
        template: the training template in Jinja. Each answer and its end token stand between {% generation %} marks,
            and an image is `image_token` once; it ships as chat_template.jinja.
        image_token: what stands for one visual token.
        controls: the other control tokens that the template writes by name; a tokenizer without them would read them as
            text.
        tower: module of the vision side, in memory.
        trained: parts of the tower that are trained, because they project into the decoder.
        disk: (pattern, replacement) pairs from names that transformers writes to those of published checkpoints.
    """

    name: str
    processor: str
    template: str
    image_token: str
    tower: str
    controls: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    disk: tuple[tuple[str, str], ...] = ()

    def published(self, key: str) -> str:
        """A weight's name in the hub's checkpoints, from the name that transformers writes."""
        for pattern, replacement in self.disk:
            key = re.sub(pattern, replacement, key)
        return key

    def lacks(self, words: Container[str]) -> str | None:
        """Which control tokens of the template a tokenizer's `words` do not have, in words, or None."""
        missing = [token for token in (self.image_token, *self.controls) if token not in words]
        return f"has no token {', '.join(missing)}" if missing else None

    def load_processor(self, folder: Path) -> Any:
        """The processor of a folder with this family's geometry, working without torchvision."""
        raise NotImplementedError

    def visual_tokens(self, processor: Any, height: int, width: int) -> int:
        """How many visual tokens an image of this size takes."""
        raise NotImplementedError

    def refusal(self, height: int, width: int) -> str | None:
        """Why this family cannot take an image of this size, or None."""
        return None

    def token_types(self, input_ids: torch.Tensor, image: int) -> dict[str, torch.Tensor]:
        """What the forward must be told of int64 `input_ids` [batch, tokens], in which `image` is a visual token."""
        return {}

    def image_inputs(self, model: Any, input_ids: torch.Tensor, pixels: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the forward takes beside tokens, on the model's device.

        Args:
            input_ids: int64 [batch, tokens].
            pixels: as the image processor gives them (`Batch.pixels`); empty where the batch has no image.
        """
        return dict(pixels)

    def positions(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixels: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Where each token of a padded batch stands: int64 [batch, tokens], or [axes, batch, tokens]."""
        return (attention_mask.cumsum(-1) - 1).clamp(min=0)

    def vision_tower(self, model: Any) -> Any | None:
        """The tower, where its output depends on the image alone and may be kept; else None."""
        return None
