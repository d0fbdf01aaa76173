"""From an image and a question to what a model reads, with the tokens of training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from grace.data.batches import collate_prompts
from grace.data.conversations import IMAGE, Message, Part
from grace.data.examples import Tokeniser
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
    asked = [((Message("user", (IMAGE, Part("text", question))),), [image]) for image, question in questions]
    return collate_prompts(Tokeniser(processor), asked)
