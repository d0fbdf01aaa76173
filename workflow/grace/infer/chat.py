"""Ask a model about an image and print the answer as it comes."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from grace.errors import GraceError
from grace.infer.decode import Session, stream
from grace.infer.load import load_for_inference
from grace.infer.prompt import build_prompts, open_image
from grace.models import load_processor


def chat(
    model: Path,
    image: Path,
    question: str,
    device: str | None = None,
    new_tokens: int = 128,
    write: Callable[[str], object] = sys.stdout.write,
) -> str:
    """Answer `question` about `image` with the checkpoint folder `model`, packed or plain; returns the answer.

    Args:
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        new_tokens: longest answer.
        write: receives each piece of text when it is ready.
    """
    if not question.strip():
        raise GraceError("the question is empty; ask something about the image")
    pixels = open_image(image)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = load_for_inference(model, device=device)
    processor = load_processor(model)
    inputs = build_prompts(processor, [(pixels, question)])
    session = Session(network, 1, inputs["input_ids"].shape[1] + new_tokens, compile=False)
    answer = ""
    for piece in pieces(processor.tokenizer, (int(token[0]) for token in stream(session, inputs, new_tokens))):
        answer += piece
        write(piece)
        sys.stdout.flush()
    write("\n")
    return answer


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
