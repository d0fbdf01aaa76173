"""LLaVA-1.5: a CLIP tower, a projector of two layers, a Llama decoder.

Trained and evaluated on images padded to a square with the processor's mean colour, and with Vicuna's template
(`vicuna_v1` of the original code): an answer ends in `</s>`, and the next turn follows it without a space.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace.errors import GraceError
from grace.families.base import Family
from grace.families.files import read_config, read_object

if TYPE_CHECKING:
    import torch

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# An image stands on a line of its own. Loops go over message.content itself, by which vLLM knows that it is a list.
TEMPLATE = (
    "{% if messages[0].role != 'system' %}" + SYSTEM + " {% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "ASSISTANT:{% generation %} "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}"
    "{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{% if message.role == 'user' %}USER: {% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if not loop.first and 'image' in (part.type, loop.previtem.type) %}{{ '\\n' }}{% endif %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "{% endif %} "
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Llava(Family):
    def load_processor(self, folder: Path) -> Any:
        from transformers import (
            AutoImageProcessor,
            AutoTokenizer,
            CLIPImageProcessorPil,
            LlavaImageProcessorPil,
            LlavaProcessor,
        )

        from grace.families.llama_vocabulary import read_sentencepiece

        if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
            tokenizer = read_sentencepiece(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer = _as_read(tokenizer)
        images = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        if isinstance(images, CLIPImageProcessorPil | LlavaImageProcessorPil):
            kept = images.to_dict()
            kept.pop("image_processor_type", None)
            settings: dict[str, Any] = {**kept, "do_pad": True}
            images = LlavaImageProcessorPil(**settings)
        about = read_object(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
        model = read_config(folder) if (folder / "config.json").is_file() else {}
        vision = model.get("vision_config") or {}
        patch = about.get("patch_size") or vision.get("patch_size")
        if not patch:
            raise GraceError(
                f"{folder}: neither processor_config.json nor config.json says patch_size; fetch the model again"
            )
        strategy = about.get("vision_feature_select_strategy") or model.get("vision_feature_select_strategy", "default")
        more = about.get("num_additional_image_tokens")
        clip = vision.get("model_type") == "clip_vision_model"
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=patch,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=more if more is not None else int(clip),  # CLIP puts a class token first
            image_token=about.get("image_token", self.image_token),
        )

    def visual_tokens(self, processor: Any, height: int, width: int) -> int:
        size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
        count = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
        return count + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")

    def image_inputs(self, model: Any, input_ids: torch.Tensor, pixels: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Kept tower features (`vision_features` [images, n, d]) go through the projector here, past the tower."""
        if "vision_features" not in pixels:
            return dict(pixels)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        projected: Any = list(model.model.multi_modal_projector(pixels["vision_features"]))
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=projected)}}

    def vision_tower(self, model: Any) -> Any:
        return model.model.vision_tower


def _as_read(tokenizer: Any) -> Any:
    """The tokenizer in a class that saves and reads its rules as they are.

    LlamaTokenizer does not save `legacy`, which decides where SentencePiece's leading spaces go: read back, it would
    give other tokens.
    """
    from transformers import PreTrainedTokenizerFast

    if not hasattr(tokenizer, "legacy"):
        return tokenizer
    rebuilt = ("backend", "vocab", "merges", "vocab_file", "tokenizer_file", "tokenizer_object")
    about = {name: value for name, value in tokenizer.init_kwargs.items() if name not in rebuilt}
    plain = type("PreTrainedTokenizerFast", (PreTrainedTokenizerFast,), {})  # the name that every version knows
    return plain(tokenizer_object=tokenizer.backend_tokenizer, **about)


FAMILY = Llava(
    name="llava",
    processor="LlavaProcessor",
    template=TEMPLATE,
    image_token="<image>",
    tower="model.vision_tower",
    # Recent transformers drop `vision_model` from CLIP's and SigLIP's names; vLLM and older ones know it alone.
    disk=(
        (
            r"^((?:model\.)?vision_tower\.)(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)",
            r"\1vision_model.",
        ),
    ),
)
