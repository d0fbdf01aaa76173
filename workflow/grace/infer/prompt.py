"""From an image and a question to what a model reads, through the processor's own chat template."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from grace.errors import GraceError


def open_image(path: str | Path) -> Image.Image:
    """An RGB image from a file; a `GraceError` says what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise GraceError(f"{path}: no such image; check the path")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise GraceError(f"{path}: not a readable image ({error}); give a whole JPEG or PNG file") from error


def build_prompts(processor, questions: Sequence[tuple[Image.Image, str]]) -> dict[str, torch.Tensor]:
    """Left-padded inputs for a batch of (image, question) pairs, up to where the answer begins."""
    if not getattr(processor, "chat_template", None):
        raise GraceError(
            "the processor has no chat template; copy chat_template.jinja beside the model's processor files"
        )
    processor.tokenizer.padding_side = "left"
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in questions
    ]
    return dict(
        processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    )
