"""From conversations to token ids and labels, through the training template.

A label is a token that the model is asked to produce: the answers and the end token behind each.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grace.data.conversations import Conversation, Message, load_conversations
from grace.data.images import EncodedImage
from grace.errors import GraceError
from grace.families import family_of
from grace.models.template import Template
from grace.progress import progress

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One conversation as a model reads it.

    Attributes:
        id: the conversation's id.
        key: identifies its teacher record (`record_key`).
        input_ids: int64 [tokens], visual tokens included.
        labels: int64 [tokens], -100 where nothing is asked; not shifted.
        caption: whether it only describes the image.
        images: the encoded images, in order; none for text alone.
        features: what the frozen vision tower makes of them, fp32 [images, n, d], where that was kept.
    """

    id: str
    key: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    caption: bool
    images: tuple[EncodedImage, ...]
    features: torch.Tensor | None = None

    def supervised_tokens(self) -> int:
        """How many labels are asked for."""
        return int((self.labels[1:] != IGNORED).sum())


def record_key(input_ids: torch.Tensor, images: Sequence[EncodedImage]) -> str:
    """SHA-256 (hex) over the token ids as little-endian int32 and the SHA-256 of each image's bytes."""
    digest = hashlib.sha256(input_ids.numpy().astype("<i4").tobytes())
    for image in images:
        digest.update(bytes.fromhex(image.sha256))
    return digest.hexdigest()


class Tokeniser:
    """Turns conversations into examples, and questions into prompts, for one processor."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.family, self.template = processor, family_of(processor), Template(processor)
        self._counts: dict[tuple[int, int], int] = {}

    def visual_tokens(self, height: int, width: int) -> int:
        """How many visual tokens an image of this size takes."""
        size = (height, width)
        if size not in self._counts:
            self._counts[size] = self.family.visual_tokens(self.processor, height, width)
        return self._counts[size]

    def __call__(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Examples in the order of `conversations`; a `GraceError` names an image that the family cannot take."""
        asked = [(c.messages, [self._count(c, image) for image in c.images]) for c in conversations]
        examples = []
        for conversation, (ids, mask) in zip(conversations, self.template.tokens(asked), strict=True):
            input_ids = torch.tensor(ids)
            labels = torch.where(torch.tensor(mask), input_ids, IGNORED)
            key = record_key(input_ids, conversation.images)
            examples.append(Example(conversation.id, key, input_ids, labels, conversation.caption, conversation.images))
        return examples

    def prompts(self, asked: Sequence[tuple[Sequence[Message], Sequence[tuple[int, int]]]]) -> list[list[int]]:
        """Token ids up to where an answer begins, exactly as training has them.

        Args:
            asked: messages, the last of them the user's, and the (height, width) of their images in order.
        """
        laid = [(messages, [self.visual_tokens(*size) for size in sizes]) for messages, sizes in asked]
        return [ids for ids, _ in self.template.tokens(laid, prompt=True)]

    def _count(self, conversation: Conversation, image: EncodedImage) -> int:
        size = image.size()
        reason = self.family.refusal(*size)
        if reason:
            raise GraceError(f"conversation {conversation.id}: its image {reason}; leave it out of the data")
        return self.visual_tokens(*size)


def load_examples(data: str | Path, processor: Any, limit: int | None = None) -> list[Example]:
    """The training examples of a data folder, tokenised by `processor`."""
    conversations = load_conversations(Path(data) / "train.parquet", limit)
    tokeniser, examples, chunk = Tokeniser(processor), [], 256
    with progress("tokenising", len(conversations)) as advance:
        for start in range(0, len(conversations), chunk):
            part = conversations[start : start + chunk]
            examples += tokeniser(part)
            advance(len(part))
    ids = [example.id for example in examples]
    if len(set(ids)) != len(ids):
        raise GraceError(f"{Path(data) / 'train.parquet'}: the same id stands twice; every row needs its own")
    return examples
