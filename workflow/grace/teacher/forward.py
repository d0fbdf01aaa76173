"""Running a model over conversations for what the method reads: states at supervised positions, Gram matrices.

The teacher goes through here when its cache is written, a student when the cache is audited against it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from grace.data import Batch, Example, collate
from grace.errors import GraceError
from grace.models import image_inputs, image_token_id, output_head
from grace.teacher.formats import gram
from grace.teacher.prefetch import ahead

TOKENS_AT_ONCE = 8192  # padded tokens of one forward pass


@dataclass
class Seen:
    """What a model makes of one conversation.

    Attributes:
        states: [tokens, d], the last hidden state (after the final norm) at the supervised positions, in the model's
            dtype.
        labels: int64 [tokens], the next token at each.
        visual: [n, d], the penultimate decoder layer's output at the visual tokens, in the model's dtype.
    """

    states: torch.Tensor
    labels: torch.Tensor
    visual: torch.Tensor

    def gram(self) -> torch.Tensor:
        """The Gram matrix fp32 [n, n] of the l2-normalised rows of `visual`."""
        return gram(self.visual)


def check_examples(examples: Sequence[Example], model: nn.Module) -> None:
    """Refuse what would only fail, or silently go wrong, in the middle of a run; a `GraceError` names the conversation."""
    vocabulary, image = output_head(model).weight.shape[0], image_token_id(model)
    for example in examples:
        where = f"conversation {example.id}"
        if not (example.input_ids == image).any():
            raise GraceError(
                f"{where}: its image has no visual tokens (id {image} is not among its tokens); check that the "
                "processor belongs to the model"
            )
        asked = example.labels[example.labels != -100]
        if len(asked) and not 0 <= int(asked.min()) <= int(asked.max()) < vocabulary:
            raise GraceError(
                f"{where}: a label lies outside the model's vocabulary of {vocabulary}; use the model's tokenizer"
            )


def supervised_tokens(example: Example) -> int:
    """How many positions predict a label."""
    return int((example.labels[1:] != -100).sum())


def plan(examples: Sequence[Example], tokens: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """Indices of `examples` in batches of like length, the longest first, each of at most `tokens` padded tokens."""
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids))
    batches: list[list[int]] = []
    for index in order:
        longest = len(examples[batches[-1][0]].input_ids) if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def see(model: nn.Module, processor, examples: Sequence[Example]) -> Iterator[tuple[int, Seen]]:
    """Run `model` over `examples` and yield (index, what it makes of it), in the order of `plan`."""
    head, image = output_head(model).weight, image_token_id(model)
    batches = plan(examples)
    collated = ahead(lambda indices: collate([examples[i] for i in indices], processor), batches)
    for indices, batch in zip(batches, collated, strict=True):
        states, labels, visual = _forward(model, batch, head, image)
        counts = [supervised_tokens(examples[index]) for index in indices]
        images = (batch.input_ids == image).sum(1).tolist()
        parts = zip(states.split(counts), labels.split(counts), visual.split(images), strict=True)
        yield from ((index, Seen(*part)) for index, part in zip(indices, parts, strict=True))


def _forward(model: nn.Module, batch: Batch, head: torch.Tensor, image: int) -> tuple[torch.Tensor, ...]:
    input_ids = batch.input_ids.to(head.device)
    rows, columns, labels = (part.to(head.device) for part in batch.supervised())
    outputs = model.model(
        input_ids=input_ids,
        attention_mask=batch.attention_mask.to(head.device),
        use_cache=False,
        output_hidden_states=True,
        **image_inputs(model, batch.pixels),
    )
    return outputs.last_hidden_state[rows, columns], labels, outputs.hidden_states[-2][input_ids == image]
