"""A question as every protocol sees it, whatever file it came from; and how a protocol shows it to a model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from jinja2 import Environment, StrictUndefined, Template

MARK = "\ufffc"  # OBJECT REPLACEMENT CHARACTER: where an image stands in a prompt
_TAG = re.compile(r"<image (\d+)>")  # MMMU's own
_TEMPLATES = Environment(undefined=StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: its own among the benchmark's rows.
        images: encoded images (JPEG, PNG, ...) by the number that the text calls them by, from 1; none for a text
            question.
        image_id: what questions are clustered by; empty without an image.
        question, hint: as the data set has them; `hint` may be empty.
        options: the choices' texts by letter; empty where none are given.
        target: the right answer: a letter, a text, or a JSON list where several count; None where it is hidden.
        group: sub-task, category or poll.
        words: OCR tokens, where the data set gives them.
    """

    id: str
    images: Mapping[int, bytes]
    image_id: str
    question: str
    options: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""
    target: str | None = None
    group: str = ""
    words: tuple[str, ...] = ()


@cache
def _template(prompt: str) -> Template:
    return _TEMPLATES.from_string(prompt)


def _tags(text: str) -> list[int]:
    """Numbers of the images that a text names, in order of first mention."""
    return list(dict.fromkeys(int(number) for number in _TAG.findall(text)))


def show(prompt: str, placing: str, item: Item) -> tuple[str, list[bytes]]:
    """What is asked: the prompt's text with a `MARK` for each image, and the images in that order.

    `placing` says which images, and where: `first` (all in front of the text), `named` (those named in question or
    options, in the order of their names, in front; the names stay), `mentioned` (those named in the question, in order
    of mention, else the first, in front; names become `<image>`), `inline` (each where it is named; unnamed ones in
    front of all).

    Raises:
        ValueError: the text names an image that is not there.
    """
    values = {"question": item.question, "hint": item.hint, "options": list(item.options.items()), "words": item.words}
    text = _template(prompt).render(values).replace(MARK, "")
    if placing == "mentioned":
        text = _TAG.sub("<image>", text)
        wanted = [n for n in _tags(item.question) if n in item.images] or sorted(item.images)[:1]
    elif placing == "named":
        wanted = sorted(_tags("\n".join([item.question, *item.options.values()])))
    elif placing == "inline" and _TAG.search(text):
        wanted = [int(n) for n in _TAG.findall(text)]
        text = _TAG.sub(MARK, text)
    else:
        wanted = sorted(item.images)
    lacking = [n for n in wanted if n not in item.images]
    if lacking:
        raise ValueError(f"names image {lacking[0]}, which it does not have")
    if placing != "inline" or MARK not in text:
        text = MARK * len(wanted) + text
    return text, [item.images[n] for n in wanted]
