"""Conversations of every kind that a family must take: one image, two of different sizes, text alone."""

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
    user = Message("user", (Part("text", "how many"), IMAGE, IMAGE))
    answer = Message("assistant", (Part("text", "two boots"),))
    wide = picture("two", 3, 60, 150)
    return [
        Conversation("one", (picture("one", 1),), asked_and_answered([("what is this", "a shirt"), ("and", "no")])),
        Conversation("two", (picture("two", 2), wide), (user, answer)),
        Conversation("none", (), asked_and_answered([("are there boots", "yes")], images=0)),
    ]
