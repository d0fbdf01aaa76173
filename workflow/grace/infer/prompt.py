"""From images and questions to what a model reads, with the tokens of training."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from grace.data.batches import collate_prompts
from grace.data.conversations import Message, Part
from grace.data.decode import Unreadable, decode
from grace.data.examples import Tokeniser
from grace.data.images import read_regular
from grace.errors import GraceError, reason

_URL = re.compile(r"^(https?|ftp|s3|data):", re.IGNORECASE)


def open_image(path: str | Path) -> Image.Image:
    """An image file in RGB as a viewer shows it: upright, on white; a `GraceError` says what is wrong with it."""
    if _URL.match(str(path)):
        raise GraceError(f"{path}: an address; download the image (`curl -LO ADDRESS`) and give the file")
    try:
        return decode(read_regular(path))[0]
    except FileNotFoundError:
        raise GraceError(f"{path}: no such image; check the path") from None
    except OSError as error:
        raise GraceError(f"{path}: not a readable image ({error.strerror or error}); give a JPEG or PNG file") from None
    except Unreadable as error:
        advice = "scale it down" if "max_pixels" in error.reason else "give a whole JPEG or PNG file"
        raise GraceError(f"{path}: not a readable image ({reason(error)}); {advice}") from None


def user_turn(images: Sequence[Image.Image], question: str) -> dict[str, Any]:
    """A message of the person who asks: images first, then the question."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def model_turn(answer: str) -> dict[str, Any]:
    """A message of the model: an earlier answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def build_prompts(processor, questions: Sequence[tuple[Image.Image, str]]) -> dict[str, torch.Tensor]:
    """Left-padded inputs for a batch of (image, question) pairs, up to where the answer begins."""
    return build_conversations(processor, [[user_turn([image], question)] for image, question in questions])


def build_conversations(processor, conversations: Sequence[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """Left-padded inputs for a batch of conversations, up to where the next answer begins.

    Returns:
        int64 `input_ids` and `attention_mask` [batch, tokens], and what the family's forward takes of the images.
    """
    asked = []
    for turns in conversations:
        said = [Message(t["role"], tuple(Part(p["type"], p.get("text", "")) for p in t["content"])) for t in turns]
        asked.append((said, [p["image"] for t in turns for p in t["content"] if p["type"] == "image"]))
    return collate_prompts(Tokeniser(processor), asked)
