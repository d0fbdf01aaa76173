"""One record of LLaVA, ShareGPT4V, OpenAI or Cauldron kind as messages and references to images.

The rules, for every kind:
- roles are system, user (also human) and assistant (also gpt); a system message may open the conversation; then user
  and assistant alternate;
- `<image>` in a user's text is the place of the record's next image; without any tag, all images stand before the
  first question; any other number of tags is an error;
- an answer before the first question and a question after the last answer are left out, as nothing can be learned;
- numbers are read as text; null, lists and objects where text belongs are errors;
- a video or a sound is an error: without it the text is about nothing.
"""

import base64
import binascii
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError, field_validator

from grace.data.conversations import IMAGE, Message, Part, Role

Format = Literal["auto", "llava", "sharegpt4v", "openai", "cauldron"]

ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
KEYS = {"llava": "conversations", "sharegpt4v": "conversations", "openai": "messages", "cauldron": "texts"}
"""The key that holds the dialogue, per format."""

MOST_MESSAGES = 10_000

# The line break that LLaVA writes between the tag and the text is the template's to write.
_TAG = re.compile(r"(?:[ \t\r]*\n\s*)?<image>(?:[ \t\r]*\n\s*)?")
_IMAGE_FILE = re.compile(r"[^\n]{1,300}\.(jpe?g|png|webp|gif|bmp|tiff?|ppm)", re.IGNORECASE)


class BadRecord(Exception):
    """A record that cannot be trained on.

    Attributes:
        reason: the kind, one of a few, to count by.
        detail: what is particular to this record.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ImageReference:
    """A record's image: a path inside the image folder, or the encoded bytes themselves."""

    path: str | None = None
    data: bytes | None = None


@dataclass
class Said:
    """What a record says.

    Attributes:
        id: the record's own, or None.
        messages: system first if at all, then user and assistant in turn, ending with an answer.
        images: in the order of the image parts of `messages`.
        notes: what was mended on the way, to be counted.
    """

    id: str | None
    messages: list[Message]
    images: list[ImageReference]
    notes: list[str] = field(default_factory=list)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"must be text, not {_kind(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be text, not a number that is not finite")
    try:
        text = str(value)
        text.encode()
    except ValueError:  # a lone surrogate; or an integer of thousands of digits
        raise ValueError("is not valid Unicode text") from None
    return text


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}.get(
        type(value), type(value).__name__
    )


Text = Annotated[str, BeforeValidator(_text)]


class _LlavaTurn(BaseModel):
    role: Text = Field(validation_alias=AliasChoices("from", "role"))
    content: Text = Field(validation_alias=AliasChoices("value", "content"))


class _Url(BaseModel):
    url: Text


class _ContentPart(BaseModel):
    type: Text
    text: Text | None = None
    image_url: _Url | Text | None = None
    image: Any = None
    path: Text | None = None
    url: Text | None = None


class _OpenAITurn(BaseModel):
    role: Text
    content: Text | list[_ContentPart]
    tool_calls: Any = None
    weight: Any = None

    @field_validator("tool_calls")
    @classmethod
    def _no_tools(cls, value: Any) -> Any:
        if value:
            raise ValueError("models here call no tools")
        return value

    @field_validator("weight")
    @classmethod
    def _trained(cls, value: Any) -> Any:
        if value not in (None, 1):
            raise ValueError("every answer is trained on alike, with weight 1")
        return value


class _CauldronTurn(BaseModel):
    user: Text
    assistant: Text


_TURNS: dict[str, TypeAdapter] = {
    "conversations": TypeAdapter(list[_LlavaTurn]),
    "messages": TypeAdapter(list[_OpenAITurn]),
    "texts": TypeAdapter(list[_CauldronTurn]),
}


def understand(record: Any, format: Format = "auto") -> Said:
    """The record's messages and images; raises `BadRecord`."""
    if not isinstance(record, dict):
        raise BadRecord("record is not an object", f"it is {_kind(record)}")
    notes: list[str] = []
    for name in ("video", "videos", "audio", "audios"):
        if record.get(name):
            raise BadRecord(f"record has {name}", "models here read images and text")
    key = _key(record, format)
    turns = _turns(record, key)
    if any(isinstance(turn, dict) and _is_number(turn.get("value", turn.get("content"))) for turn in record[key]):
        notes.append("a number was read as text")
    listed = _listed_images(record)
    messages, images = _place(turns, listed, notes)
    if not images:
        _no_other_image(record)
    messages, images = _trim(messages, images, notes)
    _check(messages)
    return Said(_id(record, notes), messages, images, notes)


def _key(record: dict, format: Format) -> str:
    keys = dict.fromkeys(KEYS.values()) if format == "auto" else [KEYS[format]]
    found = [key for key in keys if record.get(key) is not None]
    if not found:
        raise BadRecord("conversation is missing", f"no {' or '.join(f'`{key}`' for key in keys)}")
    if len(found) > 1:
        raise BadRecord("record has two conversations", f"{' and '.join(found)}; set the source's `format`")
    return found[0]


def _turns(record: dict, key: str) -> list[tuple[str, Any]]:
    """(role, content) pairs; content is text or a list of parts."""
    value = record[key]
    if not isinstance(value, list):
        raise BadRecord("conversation is not a list", f"`{key}` is {_kind(value)}")
    if not value:
        raise BadRecord("conversation is empty", f"`{key}` is an empty list")
    if len(value) > MOST_MESSAGES:
        raise BadRecord("conversation has too many messages", f"{len(value)}, limit {MOST_MESSAGES}")
    try:
        turns = _TURNS[key].validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        names = [p for p in problem["loc"] if isinstance(p, int) or p.isidentifier()]  # others are names of types
        path = key + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in names)
        said = {"missing": "is missing", "model_type": "must be an object"}.get(problem["type"], problem["msg"])
        said = said.removeprefix("Value error, ")
        raise BadRecord("message is malformed", f"{path}: {said[0].lower() + said[1:]}") from None
    if key == "texts":
        return [turn for t in turns for turn in (("user", t.user), ("assistant", t.assistant))]
    return [(turn.role, turn.content) for turn in turns]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _listed_images(record: dict) -> list[ImageReference]:
    """What `image` or `images` holds: one or a list of paths, or of encoded images as data sets keep them."""
    found = [record[name] for name in ("image", "images") if record.get(name) not in (None, "", [])]
    listed = [[_reference(item) for item in (value if isinstance(value, list) else [value])] for value in found]
    if len(listed) == 2 and listed[0] != listed[1]:
        raise BadRecord("record has two lists of images", "`image` and `images` differ")
    return listed[0] if listed else []


def _no_other_image(record: dict) -> None:
    """A record that is taken for text alone holds no image under a name that is not read."""
    for name, value in record.items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict):
            first = first.get("bytes") or first.get("path")
        if name != "id" and (isinstance(first, bytes) or (isinstance(first, str) and _IMAGE_FILE.fullmatch(first))):
            raise BadRecord("image is under an unknown key", f"{str(name)[:40]!r}; call it `image` or `images`")


def _reference(value: Any) -> ImageReference:
    if isinstance(value, bytes):
        return ImageReference(data=value)
    if isinstance(value, str):
        if value.startswith("data:"):
            return ImageReference(data=_data_url(value))
        if value.startswith(("http://", "https://")):
            raise BadRecord("image is a web address", f"{value[:100]}; download it and name the file")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRecord("image path is not valid Unicode text") from None
        return ImageReference(path=value)
    if isinstance(value, dict) and set(value) <= {"bytes", "path"} and value:
        if isinstance(value.get("bytes"), bytes):
            return ImageReference(data=value["bytes"])
        if isinstance(value.get("path"), str):
            return _reference(value["path"])
    raise BadRecord("image is neither a path nor an encoded image", f"it is {_kind(value)}")


def _data_url(value: str) -> bytes:
    head, _, body = value.partition(",")
    if not head.endswith(";base64"):
        raise BadRecord("image's data URL is not base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise BadRecord("image's data URL is not base64") from None


def _place(
    turns: list[tuple[str, Any]], listed: list[ImageReference], notes: list[str]
) -> tuple[list[Message], list[ImageReference]]:
    """Messages with an image part where each image stands, and the images in that order."""
    waiting = iter(listed)
    messages: list[Message] = []
    images: list[ImageReference] = []
    places = 0
    for name, content in turns:
        role = ROLES.get(name.strip().lower())
        if role is None:
            raise BadRecord("role is unknown", f"{name[:40]!r}; known are {', '.join(ROLES)}")
        parts: list[Part] = []
        for piece in _pieces(role, content):
            if isinstance(piece, str):
                parts.append(Part("text", piece))
                continue
            if role != "user":
                raise BadRecord("image stands outside a question", f"in a message of role {role}")
            places += piece.reference is None
            image = piece.reference or next(waiting, None)
            if image is not None:
                images.append(image)
            parts.append(IMAGE)
        if role == "system" and not parts:
            continue
        messages.append(Message(role, tuple(parts)))
    if places == 0 and listed and images:
        if listed != images:
            raise BadRecord("record has two lists of images", "parts of messages name others than the record")
        return messages, images
    if places == 0 and listed:
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise BadRecord("conversation has no question")
        messages[first] = Message("user", (*(IMAGE,) * len(listed), *messages[first].content))
        notes.append("an image without a tag was put before the first question")
        return messages, listed
    if places != len(listed):
        raise BadRecord("number of <image> tags and images differ", f"{places} tags, {len(listed)} images")
    return messages, images


@dataclass(frozen=True)
class _Place:
    """Where an image stands; `reference` where the part itself says which."""

    reference: ImageReference | None = None


def _pieces(role: Role, content: Any) -> Iterable[str | _Place]:
    """Text and places of images, in order. A tag in an answer or a system message is text like any other."""
    if isinstance(content, str):
        if role != "user" or "<image>" not in content:
            return [content] if content else []
        pieces: list[str | _Place] = []
        for number, text in enumerate(_TAG.split(content.strip())):
            pieces += [_Place()] * (number > 0) + [text] * bool(text)
        return pieces
    return [piece for part in content for piece in _part_pieces(role, part)]


def _part_pieces(role: Role, part: _ContentPart) -> Iterable[str | _Place]:
    if part.type in ("text", "input_text", "output_text"):
        if part.text is None:
            raise BadRecord("message is malformed", "a text part without text")
        return _pieces(role, part.text)
    if part.type in ("image", "image_url", "input_image"):
        url = part.image_url.url if isinstance(part.image_url, _Url) else part.image_url
        named = next((v for v in (part.image, part.path, part.url, url) if v is not None), None)
        return [_Place(_reference(named) if named is not None else None)]
    raise BadRecord("message part is of an unknown type", f"{part.type[:40]!r}; known are text, image and image_url")


def _trim(
    messages: list[Message], images: list[ImageReference], notes: list[str]
) -> tuple[list[Message], list[ImageReference]]:
    """Without an answer before the first question and a question after the last answer, and their images."""
    start = 1 if messages and messages[0].role == "system" else 0
    if len(messages) > start and messages[start].role == "assistant":
        notes.append("an answer before the first question was left out")
        messages = messages[:start] + messages[start + 1 :]
    if messages and messages[-1].role == "user":
        notes.append("a question after the last answer was left out")
        while messages and messages[-1].role == "user":
            messages = messages[:-1]
        images = images[: sum(part.type == "image" for message in messages for part in message.content)]
    return messages, images


def _check(messages: list[Message]) -> None:
    start = 1 if messages and messages[0].role == "system" else 0
    turns = messages[start:]
    if len(turns) < 2:
        raise BadRecord("conversation has no question with an answer")
    for number, message in enumerate(turns):
        if message.role != ("user", "assistant")[number % 2]:
            raise BadRecord("turns do not alternate", f"message {number + start + 1} is of role {message.role}")
        if not any(part.type == "image" or part.text.strip() for part in message.content):
            raise BadRecord("question is empty" if message.role == "user" else "answer is empty")


def _id(record: dict, notes: list[str]) -> str | None:
    value = record.get("id")
    try:
        name = _text(value).strip() if value is not None else ""
    except ValueError:
        name = ""
    if not name or len(name) > 300:
        notes.append("an id was given")
        return None
    return name
