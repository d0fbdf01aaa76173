"""One question as a model reads it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grace.data.conversations import Message, Part


@dataclass(frozen=True)
class Question:
    """One question as the model reads it.

    Attributes:
        id: names the row in messages.
        prompt: the conversation, the last turn the user's, with a part for each image (`turns` makes it).
        images: the encoded images (JPEG or PNG) in the order of their parts; none for a question about text.
        new_tokens: longest answer; None: the runner's own.
        pad: whether images are first padded to squares of the processor's mean colour.
    """

    id: str
    prompt: tuple[Message, ...]
    images: tuple[bytes, ...] = ()
    new_tokens: int | None = None
    pad: bool = False

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """What names each image as the model is shown it."""
        return tuple(hashlib.sha256(image + b"padded" * self.pad).digest() for image in self.images)

    @cached_property
    def key(self) -> str:
        """A hash of all that is asked: prompt, images, longest answer."""
        said = [[message.role, [[part.type, part.text] for part in message.content]] for message in self.prompt]
        digest = hashlib.sha256(json.dumps([self.new_tokens, said]).encode())
        for image in self.digests:
            digest.update(image)
        return digest.hexdigest()


def turns(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """A conversation from messages as chat templates take them, their content a list of parts."""
    return tuple(
        Message(said["role"], tuple(Part(part["type"], part.get("text", "")) for part in said["content"]))
        for said in messages
    )
