"""From conversations to token ids and labels, through the processor's own chat template.

A label is a token that the model is asked to produce: the answers and the end-of-turn token behind each. Where the
template marks them (`{% generation %}`), one rendering finds them; otherwise the conversation is rendered up to
every question and every answer, and the difference is the answer.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from grace.data.conversations import Conversation, load_conversations
from grace.data.images import EncodedImage
from grace.errors import GraceError
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


def messages(conversation: Conversation) -> list[dict]:
    """The conversation in the form that chat templates read."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": p.type, "text": p.text} if p.type == "text" else {"type": p.type} for p in message.content
            ],
        }
        for message in conversation.messages
    ]


def _render(said: list[dict], template: str, tokens: dict, prompt: bool = False) -> str:
    return render_jinja_template([said], chat_template=template, add_generation_prompt=prompt, **tokens)[0][0]


def _answer_spans(said: list[dict], template: str, tokens: dict) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text and the character range of every answer in it."""
    if "generation %}" in template or "generation -%}" in template:
        texts, spans = render_jinja_template(
            [said], chat_template=template, return_assistant_tokens_mask=True, **tokens
        )
        return texts[0], [tuple(span) for span in spans[0]]
    text = _render(said, template, tokens)
    spans = []
    for end in (number + 1 for number, message in enumerate(said) if message["role"] == "assistant"):
        question = _render(said[: end - 1], template, tokens, prompt=True)
        answer = _render(said[:end], template, tokens)
        if not answer.startswith(question) or not text.startswith(answer.rstrip()):
            raise GraceError(
                "the chat template changes earlier turns when later ones come; mark answers with {% generation %}"
            )
        spans.append((len(question), len(answer.rstrip())))
    return text, spans


class Tokeniser:
    """Turns conversations into examples for one processor."""

    def __init__(self, processor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.template = processor.chat_template
        if not self.template:
            raise GraceError("the processor has no chat template; save one beside it (chat_template.jinja)")
        self.tokens = {name: getattr(self.tokenizer, name) or "" for name in ("bos_token", "eos_token", "pad_token")}
        self.visual_tokens: dict[tuple[int, int], int] = {}

    def _count_visual_tokens(self, image: EncodedImage) -> int:
        """How many visual tokens this image takes; only its size matters."""
        size = image.size()
        if size not in self.visual_tokens:
            counts = self.processor._get_num_multimodal_tokens(image_sizes=[list(size)])
            self.visual_tokens[size] = counts["num_image_tokens"][0]
        return self.visual_tokens[size]

    def __call__(self, conversations: list[Conversation]) -> list[Example]:
        """Examples in the order of `conversations`."""
        texts, spans = [], []
        for conversation in conversations:
            text, answers = _answer_spans(messages(conversation), self.template, self.tokens)
            token, at = self.processor.image_token, 0
            for image in conversation.images:
                at = text.find(token, at)
                if at < 0:
                    raise GraceError(f"conversation {conversation.id}: the chat template leaves no place for the image")
                count = self._count_visual_tokens(image)
                text = text[:at] + token * count + text[at + len(token) :]
                shift = (count - 1) * len(token)
                answers = [(a + shift, b + shift) if a > at else (a, b) for a, b in answers]
                at += count * len(token)
            texts.append(text)
            spans.append(answers)
        # As the processor does: a template that writes the start token itself gets no second one.
        start = self.tokens["bos_token"]
        special = not (start and texts and texts[0].startswith(start))
        encoded = self.tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True)
        examples = []
        for conversation, ids, offsets, answers in zip(
            conversations, encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
        ):
            starts, ends = np.asarray(offsets).T
            asked = np.zeros(len(ids), bool)
            for begin, end in answers:
                asked |= (starts >= begin) & (ends <= end) & (ends > starts)
            input_ids = torch.tensor(ids)
            labels = torch.where(torch.from_numpy(asked), input_ids, IGNORED)
            key = record_key(input_ids, conversation.images)
            examples.append(Example(conversation.id, key, input_ids, labels, conversation.caption, conversation.images))
        return examples


def load_examples(data: str | Path, processor, limit: int | None = None) -> list[Example]:
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
