"""Conversations of every kind that a family must take, messages to write others with, and tokens with their labels."""

import io

import numpy as np
from PIL import Image

from grace.data import Conversation, EncodedImage
from grace.data.conversations import IMAGE, Message, Part, asked_and_answered


def picture(name, seed, height=64, width=64):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return EncodedImage.from_bytes(name, buffer.getvalue())


def conversations():
    """One image, two of different sizes, text alone."""
    user = Message("user", (Part("text", "how many"), IMAGE, IMAGE))
    answer = Message("assistant", (Part("text", "two boots"),))
    wide = picture("two", 3, 60, 150)
    return [
        Conversation("one", (picture("one", 1),), asked_and_answered([("what is this", "a shirt"), ("and", "no")])),
        Conversation("two", (picture("two", 2), wide), (user, answer)),
        Conversation("none", (), asked_and_answered([("are there boots", "yes")], images=0)),
    ]


def user(*parts):
    return Message("user", tuple(IMAGE if part is IMAGE else Part("text", part) for part in parts))


def model(text):
    return Message("assistant", (Part("text", text),))


BRIEF = Message("system", (Part("text", "Be brief."),))


def shown(template, messages, counts, prompt=False):
    """Tokens in their order, `[token]` where one is asked for."""
    ((ids, asked),) = template.tokens([(messages, counts)], prompt)
    names = template.tokenizer.convert_ids_to_tokens(ids)
    return " ".join(f"[{name}]" if wanted else name for name, wanted in zip(names, asked, strict=True))
