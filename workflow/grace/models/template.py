"""From messages to token ids through a chat template, so that text stays text.

The template is rendered once for every form of conversation (roles, and images and texts in their order), with a mark
in the place of each text. What it writes itself is read for control tokens; texts are put in afterwards and are not:
one that spells `</s>` or `<image>` becomes the characters' tokens (in a tokenizer of whole words, which has none, the
unknown word). Between two control tokens lies a run of text, which is tokenised at once as the tokenizer does it inside
the whole string, so a SentencePiece tokenizer puts its leading space where it always does.

Each answer with its end token stands between {% generation %} marks. Only these tokens are asked for. A token that
would join the prompt's end with the answer's beginning is never made: the model is asked after the prompt's tokens.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

from tokenizers import AddedToken, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from grace.errors import GraceError, reason
from grace.limits import within

SECONDS = 10.0  # for one form of conversation; a template of transformers takes milliseconds
_ANCHOR = "\U000f6772\U000f6163"  # private characters: stands before a run that does not open the sequence
_SLOT = re.compile("\U000f0000(\\d+)\U000f0001")

Shape = tuple[tuple[str, tuple[str, ...]], ...]  # (role, types of its parts) of each message


class MessagePart(Protocol):
    """A piece of a message: `type` is "image" or "text"."""

    @property
    def type(self) -> str: ...
    @property
    def text(self) -> str: ...


class SaidMessage(Protocol):
    """A message: `role` is system, user or assistant."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> Sequence[MessagePart]: ...


@dataclass(frozen=True)
class _Control:
    """A control token that the template writes."""

    id: int
    asked: bool


@dataclass(frozen=True)
class _Text:
    """What the template writes (`text`), or the place of the conversation's text number `slot`."""

    text: str
    slot: int | None
    asked: bool


@dataclass
class _Run:
    """Text between two control tokens: the prompt's part, then the answer's."""

    prompt: str = ""
    answer: str = ""
    opens: bool = False  # the sequence

    def add(self, text: str, asked: bool) -> None:
        if asked:
            self.answer += text
        else:
            self.prompt += text


class Template:
    """A processor's chat template and tokenizer.

    Raises:
        GraceError: the template does not mark its answers, or writes no end token behind them.
    """

    def __init__(self, processor: Any) -> None:
        self.tokenizer, self.source = processor.tokenizer, processor.chat_template
        if not self.source:
            raise GraceError("the processor has no chat template; save one beside it (chat_template.jinja)")
        if not marks_answers(self.tokenizer, self.source):
            raise GraceError(
                "the chat template is not one to train with: put each answer and its end token between "
                "{% generation %} and {% endgeneration %}; the end has to be a token of the tokenizer, whose eos_token "
                f"is {self.tokenizer.eos_token}"
            )
        self.image = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        self._controls = _control_tokens(self.tokenizer, processor.image_token)
        self._plain = _without_controls(self.tokenizer, self._controls)
        self._control_ids = {
            number
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if self._controls.fullmatch(token.content)
        }
        started = self.tokenizer("")["input_ids"]
        self._start = started[:1] if started and started[0] == self.tokenizer.bos_token_id else []
        self._forms = cache(self._form)

    @property
    def end(self) -> int | None:
        """The control token that ends an answer; None where the template's end is none."""
        pieces = self._forms((("user", ("text",)), ("assistant", ("text",))), False)
        ends = [piece.id for piece in pieces if isinstance(piece, _Control) and piece.asked]
        return ends[-1] if ends else None

    def tokens(
        self, conversations: Sequence[tuple[Sequence[SaidMessage], Sequence[int]]], prompt: bool = False
    ) -> list[tuple[list[int], list[bool]]]:
        """Token ids of conversations, and which of them are asked for.

        Args:
            conversations: messages, and how many visual tokens each of their images takes, in order.
            prompt: end where an answer begins.

        Raises:
            GraceError: the template leaves out a text or an image, or puts it twice.
        """
        laid = [list(self._lay(messages, prompt)) for messages, _ in conversations]
        runs = [piece for pieces in laid for piece in pieces if isinstance(piece, _Run)]
        encoded = iter(self._encode(runs))
        found = []
        for pieces, (_, counts) in zip(laid, conversations, strict=True):
            ids, asked, images = [], [], iter(counts)
            for piece in pieces:
                if isinstance(piece, _Run):
                    before, after = next(encoded)
                    ids += before + after
                    asked += [False] * len(before) + [True] * len(after)
                else:
                    times = next(images) if piece.id == self.image else 1
                    ids += [piece.id] * times
                    asked += [piece.asked] * times
            start = [] if ids[: len(self._start)] == self._start else self._start
            found.append((start + ids, [False] * len(start) + asked))
        return found

    def _lay(self, messages: Sequence[SaidMessage], prompt: bool) -> Iterator[_Control | _Run]:
        """Control tokens and the runs of text between them."""
        shape = tuple((message.role, tuple(part.type for part in message.content)) for message in messages)
        texts = [part.text for message in messages for part in message.content if part.type == "text"]
        run = _Run(opens=True)
        for number, piece in enumerate(self._forms(shape, prompt)):
            if isinstance(piece, _Text):
                run.add(piece.text if piece.slot is None else texts[piece.slot], piece.asked)
                continue
            if run.prompt or run.answer:
                yield run
            yield piece
            # behind the token that begins a text stands what the tokenizer takes for its first word
            run = _Run(opens=number == 0 and piece.id == self.tokenizer.bos_token_id)
        if run.prompt or run.answer:
            yield run

    def _form(self, shape: Shape, prompt: bool) -> list[_Control | _Text]:
        """What the template writes around the texts of every conversation of this shape."""
        text, spans = _rendered(self.tokenizer, self.source, shape, prompt)
        pieces: list[_Control | _Text] = []
        for part, asked in _parts(text, spans):
            at = 0
            for slot in _SLOT.finditer(part):
                pieces += self._written(part[at : slot.start()], asked)
                pieces.append(_Text("", int(slot[1]), asked))
                at = slot.end()
            pieces += self._written(part[at:], asked)
        slots = [piece.slot for piece in pieces if isinstance(piece, _Text) and piece.slot is not None]
        kinds = [kind for _, content in shape for kind in content]
        images = sum(isinstance(piece, _Control) and piece.id == self.image for piece in pieces)
        if slots != list(range(kinds.count("text"))) or images != kinds.count("image"):
            raise GraceError(
                f"the chat template does not keep every text and image of a conversation once and in order "
                f"({', '.join(role for role, _ in shape)}); use the template of the model's family"
            )
        return pieces

    def _written(self, text: str, asked: bool) -> Iterator[_Control | _Text]:
        """What the template itself writes, read for control tokens."""
        at = 0
        for found in self._controls.finditer(text):
            if found.start() > at:
                yield _Text(text[at : found.start()], None, asked)
            yield _Control(self.tokenizer.convert_tokens_to_ids(found.group().strip()), asked)
            at = found.end()
        if at < len(text):
            yield _Text(text[at:], None, asked)

    def _encode(self, runs: Sequence[_Run]) -> list[tuple[list[int], list[int]]]:
        """Ids of each run's prompt and of its answer."""
        found = []
        whole = [_ANCHOR * (not run.opens) + run.prompt + run.answer for run in runs]
        for run, encoded in zip(runs, self._plain.encode_batch(whole, add_special_tokens=False), strict=True):
            ids = self._content(encoded.ids, run.opens)
            if not run.answer or not run.prompt:
                found.append((ids, []) if run.prompt else ([], ids))
                continue
            end = len(run.prompt) + len(_ANCHOR) * (not run.opens)  # in characters
            offsets = encoded.offsets[len(encoded.offsets) - len(ids) :]
            cut = next((n for n, (start, _) in enumerate(offsets) if start >= end), len(ids))
            if any(stop > end for _, stop in offsets[:cut]):  # a token across the border
                found.append((self._alone(run.prompt, run.opens), self._alone(run.answer, False)))
            else:
                found.append((ids[:cut], ids[cut:]))
        return found

    def _alone(self, text: str, opens: bool) -> list[int]:
        encoded = self._plain.encode(_ANCHOR * (not opens) + text, add_special_tokens=False)
        return self._content(encoded.ids, opens)

    def _content(self, ids: list[int], opens: bool) -> list[int]:
        ids = ids if opens else ids[1:]
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and not self._control_ids.isdisjoint(
            ids
        ):  # whole words: the text's token is the control's
            ids = [unknown if token in self._control_ids else token for token in ids]
        if self._plain.token_to_id(_ANCHOR) in ids:
            raise GraceError(f"a text holds the characters {_ANCHOR.encode('unicode_escape').decode()}; leave it out")
        return ids


def marks_answers(tokenizer: Any, template: str) -> bool:
    """Whether a template can be trained with: it marks each answer, with the token that ends it inside the marks."""
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return False
    text, spans = _rendered(tokenizer, template, (("user", ("text",)), ("assistant", ("text",))), prompt=False)
    if len(spans) != 1:
        return False
    last = text[slice(*spans[0])].rsplit("\U000f0001", 1)[-1].strip()
    return last in {str(token) for token in tokenizer.added_tokens_decoder.values()}


def _rendered(tokenizer: Any, template: str, shape: Shape, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
    """The template's text with marks in the place of texts, and the character spans of the answers."""
    messages, slot = [], 0
    for role, kinds in shape:
        content = []
        for kind in kinds:
            content.append(
                {"type": "image"} if kind == "image" else {"type": "text", "text": f"\U000f0000{slot}\U000f0001"}
            )
            slot += kind == "text"
        messages.append({"role": role, "content": content})
    names = {name: getattr(tokenizer, name) or "" for name in ("bos_token", "eos_token", "pad_token")}
    try:
        with within(
            SECONDS, f"the chat template takes more than {SECONDS:.0f} s; use the template of the model's family"
        ):
            texts, spans = cast(Any, render_jinja_template)(  # its types have no template's own names
                [messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **names,
            )
    except GraceError:
        raise
    except Exception as error:  # jinja's own, and whatever a template raises
        raise GraceError(
            f"the chat template cannot be rendered ({reason(error)}); use the template of the model's family"
        ) from error
    return texts[0], [(start, end) for start, end in spans[0]]


def _parts(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """The text cut at the spans, and whether each part lies in one."""
    at = 0
    for start, end in spans:
        yield text[at:start], False
        yield text[start:end], True
        at = end
    yield text[at:], False


def _control_tokens(tokenizer: Any, image: str) -> re.Pattern:
    """Finds the control tokens in what a template writes, with the spaces that they swallow."""
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.special or token.content == image]
    patterns = []
    for token in sorted(tokens, key=lambda token: -len(token.content)):
        left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
        patterns.append(left + re.escape(token.content) + right)
    return re.compile("|".join(patterns) or r"(?!)")


def _without_controls(tokenizer: Any, controls: re.Pattern) -> Tokenizer:
    """The tokenizer's own rules without control tokens, and with the anchor."""
    if not tokenizer.is_fast:
        raise GraceError(f"{type(tokenizer).__name__} has no tokenizer.json; convert it to a fast tokenizer")
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in about["added_tokens"]:
        token["special"] |= controls.fullmatch(token["content"]) is not None
    plain = Tokenizer.from_str(json.dumps(about))
    plain.no_padding()
    plain.no_truncation()
    plain.encode_special_tokens = True  # special ones are read as text
    plain.add_tokens([AddedToken(_ANCHOR, special=False, normalized=False)])
    return plain
