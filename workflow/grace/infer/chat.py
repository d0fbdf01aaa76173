"""Ask a model about images and print the answer as it comes; a conversation where no question is given at once."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from grace.errors import GraceError
from grace.families.files import read_config
from grace.infer.decode import Session, stream
from grace.infer.load import load_for_inference
from grace.infer.prompt import build_conversations, model_turn, open_image, user_turn
from grace.models import load_processor

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_OPENERS = {
    "awq": "vLLM opens it, and transformers with gptqmodel",
    "gptq": "vLLM opens it, and transformers with gptqmodel",
}


def check_model(folder: Path) -> None:
    """Raise a `GraceError` that says what opens `folder`, where `grace chat` does not."""
    if folder.is_file():
        raise GraceError(f"{folder}: a file; --model takes the folder that holds it")
    if not folder.exists():
        if _HUB_ID.match(str(folder)):
            raise GraceError(
                f"{folder}: no such folder; if it is a model on the hub, bring it here with "
                f"`grace fetch {folder} --out FOLDER` and give --model FOLDER"
            )
        raise GraceError(f"{folder}: no such folder; give a model folder, packed or plain")
    config = folder / "config.json"
    if not config.is_file() and any(folder.glob("*.gguf")):
        raise GraceError(
            f"{folder}: a GGUF export, which llama.cpp opens: llama-server -m {folder}/model-Q4_0.gguf "
            f"--mmproj {folder}/mmproj-BF16.gguf"
        )
    about = read_config(folder).get("quantization_config") if config.is_file() else None
    method = about.get("quant_method") if isinstance(about, dict) else None
    if method in _OPENERS:
        raise GraceError(
            f"{folder}: an {method.upper()} export ({_OPENERS[method]}); chat with the packed folder that it was made "
            "from"
        )


@dataclass
class Conversation:
    """A model, and what was said so far.

    Attributes:
        turns: messages as chat templates take them, images inside.
        waiting: images that belong to the next question.
    """

    network: torch.nn.Module
    processor: Any
    new_tokens: int
    turns: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[Image.Image] = field(default_factory=list)

    def ask(self, question: str, write: Callable[[str], object]) -> dict[str, Any]:
        """Answer a question; `write` receives each piece of text when it is ready.

        Returns:
            `answer`, the `tokens` generated, and whether it `ended` by itself within `new_tokens`.

        Raises:
            GraceError: an empty question, or a conversation longer than the model's positions.
        """
        _check_question(question)
        turns = [*self.turns, user_turn(self.waiting, question)]
        inputs = build_conversations(self.processor, [turns])
        length, limit = inputs["input_ids"].shape[1], _positions(self.network)
        if length + self.new_tokens > limit:
            raise GraceError(
                f"{length} tokens of images and text and {self.new_tokens} of an answer are more than the model's "
                f"{limit} positions; ask less, or start again"
            )
        session = Session(self.network, 1, length + self.new_tokens, compile=False)
        tokens: list[int] = []
        answer = ""
        for piece in pieces(self.processor.tokenizer, _kept(session, inputs, self.new_tokens, tokens)):
            answer += piece
            write(piece)
        self.turns, self.waiting = [*turns, model_turn(answer)], []
        return {"answer": answer, "tokens": len(tokens), "ended": bool(tokens) and tokens[-1] in session.ends}


def _kept(session: Session, inputs: dict, new_tokens: int, tokens: list[int]) -> Iterator[int]:
    for token in stream(session, inputs, new_tokens):
        tokens.append(int(token[0]))
        yield tokens[-1]


def _positions(network: Any) -> int:
    return network.config.get_text_config().max_position_embeddings


def _check_question(question: str) -> None:
    if not question.strip():
        raise GraceError("the question is empty; ask something about the image")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise GraceError("the question is no valid text in this terminal's encoding; write it in UTF-8") from None


def chat(
    model: Path,
    images: Sequence[str | Path],
    question: str | None = None,
    device: str | None = None,
    new_tokens: int = 128,
    as_json: bool = False,
    questions: Iterable[str] | None = None,
) -> list[str]:
    """`grace chat`: answer one question about images, or one after the other, on standard output.

    Args:
        model: a model folder, packed or plain.
        images: files; they come before the first question.
        question: what to ask; None takes `questions`, and keeps what was said.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        new_tokens: longest answer.
        as_json: one JSON object a line: model, images, question, answer, tokens, ended.
        questions: where questions come from; None reads them from the terminal until an empty line.

    Returns:
        The answers.

    Raises:
        GraceError: no model folder, no readable image, an empty question.
    """
    if question is not None:
        _check_question(question)
    pixels = [open_image(image) for image in images]
    check_model(Path(model))
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a letter that the terminal lacks is no reason to stop
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = load_for_inference(model, device=device)
    talk = Conversation(network, load_processor(model), new_tokens, waiting=pixels)
    answers = []
    for asked in [question] if question is not None else questions or _typed():
        said = talk.ask(asked, (lambda _: None) if as_json else _show)
        answers.append(said["answer"])
        if as_json:
            about = {"model": str(model), "images": [str(image) for image in images], "question": asked, **said}
            print(json.dumps(about), flush=True)
        else:
            print(flush=True)
    return answers


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _typed() -> Iterator[str]:
    """Questions from standard input, until an empty line or its end; a terminal is shown where to type."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            asked = input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
        if not asked.strip():
            return
        yield asked


def pieces(tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it becomes certain: a character of several tokens is held back until its last one is there."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(shown):
            continue
        yield text[len(shown) :]
        shown = text
