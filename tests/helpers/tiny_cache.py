"""Conversations and their cache's parameters, both tiny."""

import io
import math

import numpy as np
import torch
from PIL import Image

from grace.config.job_parameters import CacheRun
from grace.config.schema import Cache
from grace.data import Conversation, EncodedImage
from grace.data.conversations import as_row, asked_and_answered
from grace.files import write_json

FORMATS = ("hidden", "hidden-int8", "sampled")
IMAGE = 4  # id of an image's token
COLOURS = ("red", "blue", "green")


def make_image(number):
    """A PNG of noise; the same number is the same image."""
    pixels = np.random.default_rng(number).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def row(number):
    """A conversation; numbers 0 and 1 are about the same image."""
    turns = [
        (f"what colour is the {thing}", COLOURS[(number + i) % 3]) for i, thing in enumerate(("shirt", "bag", "coat"))
    ]
    image = EncodedImage.from_bytes(f"row{number}", make_image(max(number, 1)))
    return as_row(Conversation(f"row{number}", (image,), asked_and_answered(turns[: 1 + number % 3])))


def run_file(folder, format="hidden", shards=3, **change):
    values = dict(
        family="llava", compute_dtype="float32", cache=Cache(format=format, shards=shards, audit=0.3), temperature=2.0
    )
    path = folder / f"{format}-{shards}-{len(change)}.json"
    write_json(path, CacheRun(**{**values, **change}).model_dump())
    return path


def gates_of(logits):
    return torch.exp(-torch.special.entr(logits.softmax(1)).sum(1) / math.log(logits.shape[1]))
