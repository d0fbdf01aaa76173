"""Which conversations make which optimiser step, and the tensors a model takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL.Image import Image

from grace.data.conversations import Message
from grace.data.examples import IGNORED, Example, Tokeniser
from grace.data.packing import PackedRow

LENGTH_WINDOW = 16  # optimiser steps whose conversations are sorted by length together


@dataclass
class Batch:
    """Right-padded conversations.

    Attributes:
        input_ids, attention_mask: int64 [batch, tokens].
        labels: int64 [batch, tokens], -100 where nothing is asked; not shifted.
        pixels: of the images, in order, what the image processor makes: `pixel_values` (for Qwen also
            `image_grid_thw`), or `vision_features` [images, n, d] where the frozen tower's output was kept; empty for
            text alone. `models.forward_inputs` turns it into what the forward takes.
        keys: the teacher records, in order.
        ids: the conversations, in order.
        packed: the same tokens laid end to end, where the forward pass takes them so.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixels: dict[str, torch.Tensor]
    keys: list[str]
    ids: list[str]
    packed: PackedRow | None = None

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            attention_mask=self.attention_mask.pin_memory(),
            labels=self.labels.pin_memory(),
            pixels={name: value.pin_memory() for name, value in self.pixels.items()},
            packed=self.packed and self.packed.pin_memory(),
        )

    def place(self, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the forward pass puts these rows and columns of `input_ids`."""
        if self.packed is None:
            return rows, columns
        return torch.zeros_like(rows), self.packed.starts[rows] + columns

    def supervised(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows and columns [tokens] of the positions that predict a label, and these labels [tokens]."""
        rows, columns = torch.nonzero(self.labels[:, 1:] != IGNORED, as_tuple=True)
        return rows, columns, self.labels[rows, columns + 1]

    def visual(self, image: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Rows and columns [visual tokens] of the tokens `image`, and how many each image has, in order."""
        rows, columns = torch.nonzero(self.input_ids == image, as_tuple=True)
        return rows, columns, [count for row in self.input_ids for count in image_runs(row, image)]


def image_runs(input_ids: torch.Tensor, image: int) -> list[int]:
    """How many visual tokens each image of a conversation has: the lengths of the runs of `image` in int64 [tokens].

    Between two images every template writes something.
    """
    shown = torch.nn.functional.pad((input_ids == image).int(), (1, 1))
    edges = shown.diff().nonzero().flatten()  # starts and ends in turn
    return (edges[1::2] - edges[::2]).tolist()


def collate(examples: Sequence[Example], processor) -> Batch:
    """Pad `examples` to a batch."""
    ends = [len(example.input_ids) for example in examples]
    shape = (len(examples), max(ends))
    pad = processor.tokenizer.pad_token_id
    input_ids = torch.full(shape, pad if pad is not None else processor.tokenizer.eos_token_id)  # masked either way
    labels = torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, (example, end) in enumerate(zip(examples, ends, strict=True)):
        input_ids[row, :end] = example.input_ids
        labels[row, :end] = example.labels
        attention_mask[row, :end] = 1
    shown = [example for example in examples if example.images]
    if not shown:
        pixels = {}
    elif len(features := [example.features for example in shown if example.features is not None]) == len(shown):
        pixels = {"vision_features": torch.cat(features)}
    else:
        images = [image.open() for example in shown for image in example.images]
        pixels = dict(processor.image_processor(images=images, return_tensors="pt"))
    return Batch(input_ids, attention_mask, labels, pixels, [e.key for e in examples], [e.id for e in examples])


def collate_prompts(
    tokeniser: Tokeniser, asked: Sequence[tuple[Sequence[Message], Sequence[Image]]]
) -> dict[str, torch.Tensor]:
    """What a model's `forward` and `generate` take of questions, up to where the answers begin.

    Args:
        asked: messages, the last of them the user's, and their images in order.

    Returns: left-padded int64 `input_ids` and `attention_mask` [batch, tokens], and where there are images what the
        family's forward takes of them.
    """
    processor, images = tokeniser.processor, [image for _, own in asked for image in own]
    prompts = tokeniser.prompts([(said, [(image.height, image.width) for image in own]) for said, own in asked])
    shape = (len(prompts), max(map(len, prompts)))
    pad = processor.tokenizer.pad_token_id
    input_ids = torch.full(shape, pad if pad is not None else processor.tokenizer.eos_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, shape[1] - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, shape[1] - len(prompt) :] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if images:
        inputs |= dict(processor.image_processor(images=images, return_tensors="pt"))
        inputs |= tokeniser.family.token_types(input_ids, tokeniser.template.image)
    return inputs


def plan_batches(lengths: Sequence[int] | np.ndarray, batch: int, seed: int, alike: bool = True) -> Iterator[list[int]]:
    """Yield the indices of each optimiser step's conversations, for ever.

    Every epoch is a new permutation. With `alike`, for padded batches, conversations of like length come together
    within a window of some steps, and the steps of a window are shuffled again; rows are packed better from all
    lengths. The order depends on `seed` alone, so a resumed run skips to its step.
    """
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(lengths), generator=generator)
        window = batch * LENGTH_WINDOW
        for start in range(0, len(order), window):
            part = order[start : start + window].tolist()
            if alike:
                part.sort(key=lambda index: (lengths[index], index))
            steps = [part[i : i + batch] for i in range(0, len(part), batch)]
            for which in torch.randperm(len(steps), generator=generator).tolist():
                yield steps[which]
        epoch += 1
