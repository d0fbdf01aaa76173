"""Qwen2-VL: a tower for images of any size, whose last part merges patches and projects; a Qwen2 decoder.

An image is resized to multiples of a merged patch within the processor's limits of pixels. Positions of visual tokens
have three axes, which the forward works out from `image_grid_thw` and `mm_token_type_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace.families.base import Family

if TYPE_CHECKING:
    import torch

SYSTEM = "You are a helpful assistant."
ASPECT = 200  # the processor's limit of the longer over the shorter side


def chatml(system: str | None) -> str:
    """Qwen's ChatML with images in place; `system` opens a conversation that has no system turn of its own."""
    opening = f"<|im_start|>system\n{system}<|im_end|>\n"
    return (
        (f"{{% if messages[0].role != 'system' %}}{{{{ {opening!r} }}}}{{% endif %}}" if system else "")
        + "{% for message in messages %}"
        "<|im_start|>{{ message.role }}{{ '\\n' }}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}"
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{{ part.text }}{% endfor %}"
        "{% endif %}<|im_end|>{% endgeneration %}"
        "{% else %}"
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}"
        "{% endif %}<|im_end|>"
        "{% endif %}"
        "{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    )


@dataclass(frozen=True, kw_only=True)
class Qwen(Family):
    image_token: str = "<|image_pad|>"
    tower: str = "model.visual"
    controls: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")

    def load_processor(self, folder: Path) -> Any:
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

        images = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return self._images_only()(image_processor=images, tokenizer=tokenizer)

    def _images_only(self) -> Any:
        """The family's processor without its part for videos, which needs torchvision; saved under the same name."""
        import transformers

        whole = getattr(transformers, self.processor)

        def start(self, image_processor=None, tokenizer=None, chat_template=None, **_):
            whole.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)

        return type(self.processor, (whole,), {"__init__": start})

    def visual_tokens(self, processor: Any, height: int, width: int) -> int:
        images = processor.image_processor
        return images.get_number_of_image_patches(height, width, {}) // images.merge_size**2

    def refusal(self, height: int, width: int) -> str | None:
        if max(height, width) > ASPECT * min(height, width):
            return f"is {width} x {height} pixels, and {self.name} takes an aspect ratio of at most {ASPECT}"
        return None

    def token_types(self, input_ids: torch.Tensor, image: int) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": (input_ids == image).int()}

    def positions(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixels: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        plain = super().positions(model, input_ids, attention_mask, pixels)
        if "image_grid_thw" not in pixels:
            return plain.expand(3, *plain.shape)
        types = self.token_types(input_ids, model.config.image_token_id)
        places = {"image_grid_thw": pixels["image_grid_thw"], "attention_mask": attention_mask}
        return model.model.get_rope_index(input_ids, **types, **places)[0]

    def image_inputs(self, model: Any, input_ids: torch.Tensor, pixels: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {**pixels, **self.token_types(input_ids, model.config.image_token_id)} if pixels else {}


FAMILY = Qwen(name="qwen2_vl", processor="Qwen2VLProcessor", template=chatml(SYSTEM), trained=("merger",))
