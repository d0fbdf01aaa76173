"""Running a model over conversations for what the method reads: states at supervised positions, Gram matrices.

The teacher goes through here when its cache is written, a student when the cache is audited against it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from grace.data import Batch, Conversation, EncodedImage, Example, collate
from grace.data.conversations import asked_and_answered
from grace.data.examples import IGNORED, Tokeniser
from grace.data.packed import packed_row
from grace.data.packing import fill_rows
from grace.data.prepared import blocks_of, lengths_of
from grace.distill.relational_cka import gram_matrix
from grace.errors import GraceError, reason
from grace.models import forward_inputs, image_token_id, output_head
from grace.teacher.prefetch import ahead, spare_threads

TOKENS_AT_ONCE = 8192  # padded tokens of one forward pass
ROWS_TOGETHER = 64  # packed rows that are filled from the same conversations


@dataclass
class Seen:
    """What a model makes of one conversation.

    Attributes:
        states: [tokens, d], the last hidden state (after the final norm) at the supervised positions, in the model's
            dtype.
        labels: int64 [tokens], the next token at each.
        visual: per image [n, d], the penultimate decoder layer's output at its visual tokens, in the model's dtype.
    """

    states: torch.Tensor
    labels: torch.Tensor
    visual: list[torch.Tensor]

    def grams(self) -> list[torch.Tensor]:
        """Per image the Gram matrix fp32 [n, n] of the l2-normalised rows of `visual`."""
        return [gram_matrix(tokens) for tokens in self.visual]


def check_examples(examples: Sequence[Example], model: nn.Module, vocabulary: int) -> None:
    """Refuse what would only fail, or silently go wrong, in the middle of a run; a `GraceError` names the conversation.

    Args:
        vocabulary: V of the tokenizer; the model may have more rows, which are padding.
    """
    rows, image = len(output_head(model).weight), image_token_id(model)
    if rows < vocabulary:
        raise GraceError(
            f"the tokenizer has {vocabulary} tokens and the model {rows} rows for them; use the model's own tokenizer"
        )
    for first, block in blocks_of(examples):
        starts = block.lengths.cumsum() - block.lengths
        shown = block.input_ids == image
        begins = shown.copy()
        begins[1:] &= ~shown[:-1]
        begins[starts] = shown[starts]
        runs = np.add.reduceat(begins, starts, dtype=np.int64)
        if (other := np.flatnonzero(runs != block.images)).size:
            at = int(other[0])
            raise GraceError(
                f"conversation {examples[first + at].id}: it has {block.images[at]} images, and visual tokens (id "
                f"{image}) for {runs[at]}; check that the processor belongs to the model"
            )
        wrong = (block.labels != IGNORED) & ((block.labels < 0) | (block.labels >= vocabulary))
        if wrong.any():
            at = int(np.searchsorted(starts, int(wrong.argmax()), side="right")) - 1
            raise GraceError(
                f"conversation {examples[first + at].id}: a label lies outside the model's vocabulary of {vocabulary}; "
                "use the model's tokenizer"
            )


def check_sight_alone(model: nn.Module, processor: Any) -> None:
    """`check_sight` without data: the model is asked about an image of noise."""
    pixels = torch.randint(0, 256, (224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoded = BytesIO()
    Image.fromarray(pixels.numpy()).save(encoded, "PNG")
    image = EncodedImage.from_bytes("noise", encoded.getvalue())
    asked = Conversation("noise", (image,), asked_and_answered([("what is this", "yes")]))
    check_sight(model, processor, Tokeniser(processor)([asked]))


@torch.inference_mode()
def check_sight(model: Any, processor: Any, examples: Sequence[Example], pass_tokens: int | None = None) -> None:
    """Refuse a model whose answers do not depend on its image: exchange one, and the logits must change.

    A forward that does not know an argument may swallow it without a word, and would train blind. The first example
    with an image and a label is asked with the image as it is and with its negative.

    Args:
        pass_tokens: as `see` takes it.

    Raises:
        GraceError: no logit changes, or the forward cannot take the image.
    """
    shown = next((example for example in examples if example.images and example.supervised_tokens()), None)
    if shown is None:
        return
    batch = _prepared(model, processor, [shown], pass_tokens)
    negative = {name: -value if value.is_floating_point() else value for name, value in batch.pixels.items()}
    rows, columns = batch.place(*batch.supervised()[:2])
    logits = []
    for pixels in (batch.pixels, negative):
        try:
            inputs = forward_inputs(model, batch.input_ids, batch.attention_mask, pixels, batch.packed)
            states = model.model(**inputs, use_cache=False).last_hidden_state
        except (ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise GraceError(
                f"conversation {shown.id}: the model cannot take its image ({reason(error)}); "
                "check that the processor belongs to the model"
            ) from error
        logits.append(output_head(model)(states[rows.to(states.device), columns.to(states.device)]))
    if torch.equal(*logits):
        raise GraceError(
            f"conversation {shown.id}: another image changes none of the model's logits, so it does not see; check its "
            "vision tower and projector, and that transformers is of the tested range"
        )


def plan(examples: Sequence[Example], tokens: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """Indices of `examples` in batches of like length, the longest first, each of at most `tokens` padded tokens."""
    lengths = lengths_of(examples).tolist()
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def plan_rows(examples: Sequence[Example], capacity: int) -> Iterator[list[int]]:
    """Indices of `examples` that share a packed row of `capacity` tokens; neighbours stay near each other."""
    lengths = lengths_of(examples).tolist()
    begin = total = 0
    for end, length in enumerate(lengths, 1):
        total += length
        if total >= ROWS_TOGETHER * capacity or end == len(lengths):
            yield from ([begin + index for index in row] for row in fill_rows(lengths[begin:end], capacity))
            begin, total = end, 0


@torch.inference_mode()
def see(
    model: nn.Module, processor: Any, examples: Sequence[Example], pass_tokens: int | None = None
) -> Iterator[tuple[int, Seen]]:
    """Run `model` over `examples` and yield (index, what it makes of it), in the order of `plan`.

    Args:
        pass_tokens: tokens of a packed row, of a model that `prepare_packed` has prepared; None: padded batches.
    """
    image = image_token_id(model)
    batches = plan(examples) if pass_tokens is None else list(plan_rows(examples, pass_tokens))

    def prepared(indices: list[int]) -> Batch:
        return _prepared(model, processor, [examples[index] for index in indices], pass_tokens)

    threads = spare_threads(1) if torch.cuda.is_available() else 1
    for indices, batch in zip(batches, ahead(prepared, batches, max(2, threads), threads), strict=True):
        states, labels, visual = _forward(model, batch, image)
        counts = [examples[index].supervised_tokens() for index in indices]
        parts = zip(indices, states.split(counts), labels.split(counts), strict=True)
        for index, own, asked in parts:
            yield index, Seen(own, asked, [next(visual) for _ in examples[index].images])


def _prepared(model: Any, processor: Any, examples: Sequence[Example], pass_tokens: int | None) -> Batch:
    """The tensors of one forward pass over `examples`."""
    batch = collate(examples, processor)
    if pass_tokens is not None:
        batch.packed = packed_row(model, batch, pass_tokens)
    return batch


def _forward(model: Any, batch: Batch, image: int) -> tuple[torch.Tensor, torch.Tensor, Iterator[torch.Tensor]]:
    """States [tokens, d] and labels [tokens] of the supervised positions, and each image's visual tokens [n, d]."""
    inputs = forward_inputs(model, batch.input_ids, batch.attention_mask, batch.pixels, batch.packed)
    outputs = model.model(**inputs, use_cache=False, output_hidden_states=True)
    device = outputs.last_hidden_state.device
    rows, columns, labels = batch.supervised()
    rows, columns, labels = (part.to(device) for part in (*batch.place(rows, columns), labels))
    at, place, sizes = batch.visual(image)
    at, place = batch.place(at, place)
    visual = outputs.hidden_states[-2][at.to(device), place.to(device)].split(sizes)
    return outputs.last_hidden_state[rows, columns], labels, iter(visual)
