"""Reading prompts about images into a session; what prompts about the same images begin with is computed once.

Keys and values of a token depend on what stands before it alone. Prompts that agree up to the end of their last image
therefore share everything up to there: it is computed once for each set of images and copied into the cache of every
prompt. The prompts' last `S` tokens, the same number for all, are then computed prompt by prompt, where `S` is the
longest remainder; a shorter one computes some of its shared tokens again, so that nothing but padding in front ever
stands between tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache

from grace.errors import GraceError
from grace.infer.decode import Session, best_logprob
from grace.models import image_token_id
from grace.models.families import family_of


@dataclass(frozen=True, eq=False)
class Seen:
    """What the vision side makes of one image.

    Attributes:
        tokens: what stands in the place of its visual tokens, [n, d].
        deep: what the decoder's first layers add there, a [n, d] for each of them (Qwen3-VL); else empty.
        grid: int64 [3], its patches in time, height and width, where positions depend on them (Qwen); else None.
    """

    tokens: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()
    grid: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(each.nbytes for each in self.deep)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt: token ids with a visual token for every one of its images', and the images in order."""

    ids: Sequence[int]
    images: Sequence[Seen] = field(default=())


def see(model: Any, pixels: dict[str, torch.Tensor]) -> list[Seen]:
    """What the vision side makes of images, from what the image processor makes of them."""
    place = {"device": model.device}
    inputs = {
        name: value.to(**place, dtype=model.dtype if value.is_floating_point() else None)
        for name, value in pixels.items()
    }
    made = model.get_image_features(**inputs)
    grids = pixels.get("image_grid_thw", [None] * len(made.pooler_output))
    deep = getattr(made, "deepstack_features", None) or ()
    layers = zip(*deep, strict=True) if deep else [()] * len(made.pooler_output)
    return [Seen(*each) for each in zip(made.pooler_output, layers, grids, strict=True)]


@torch.inference_mode()
def read(session: Session, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Read one prompt for each of the session's sequences; the next tokens' logits, fp32 [batch, vocab].

    The most likely of them are the session's tokens then, as after `Session.prefill`.

    Raises:
        GraceError: another number of prompts than the session has sequences, or prompts too long for it.
    """
    lengths = [len(prompt.ids) for prompt in prompts]
    width = max(lengths)
    if len(prompts) != session.batch or width >= session.length or session.cache_bits != 16:
        raise GraceError(
            f"a session for {session.batch} sequences of {session.length} tokens in {session.cache_bits} bits got "
            f"{len(prompts)} prompts of up to {width} tokens; make a larger one, in 16 bits"
        )
    model, device = session.model, session.device
    places = [_positions(model, prompt) for prompt in prompts]  # each [axes, tokens]
    shared = _shared(prompts, image_token_id(model))  # by group: prompts, tokens in front
    rest = max(1, *(lengths[i] - ahead for rows, ahead in shared for i in rows))  # S
    if 2 * len(shared) > len(prompts):
        rest = width  # little is shared: one pass, and no second copy of keys and values
    session._reset()
    first = torch.tensor([width - length for length in lengths], device=device)
    session.first.copy_(first)
    with session._memory():
        if rest < width:
            _copy_shared(session, prompts, places, shared, width - rest, first)
        layers: list[Any] = session.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(width - rest)
        at = torch.arange(width - rest, width, device=device).unsqueeze(1)  # [S, 1]: slots of the tokens computed now
        seen = (session.slots <= at) & (session.slots >= first[:, None, None]) | (session.slots == at)
        windows = [(max(0, length - rest), length) for length in lengths]
        hidden = _run(session, prompts, places, windows, rest, session.cache, seen, left=True)[:, -1]
        logits = session.head(hidden).float()
    session.token.copy_(logits.argmax(-1, keepdim=True))
    session.logprob.copy_(best_logprob(logits))
    session.position.copy_(torch.tensor([int(place.max()) + 1 for place in places], device=device))
    session.slot.fill_(width)
    session.filled = width
    return logits


def follow(session: Session, new_tokens: int) -> Iterator[torch.Tensor]:
    """After `read`: int64 [batch] tokens of the answers, `new_tokens` of them."""
    yield session.token[:, 0].clone()
    for _ in range(1, new_tokens):
        yield session.step()


def _positions(model: nn.Module, prompt: Prompt) -> torch.Tensor:
    """Positions of the prompt's tokens, [1, tokens], or [3, tokens] with time, height and width."""
    ids = torch.tensor([list(prompt.ids)])
    pixels = {}
    if prompt.images and prompt.images[0].grid is not None:
        pixels = {"image_grid_thw": torch.stack([cast(torch.Tensor, image.grid).cpu() for image in prompt.images])}
    found = family_of(model).positions(model, ids, torch.ones_like(ids), pixels)
    return found[:, 0] if found.dim() == 3 else found


def _shared(prompts: Sequence[Prompt], image: int) -> list[tuple[list[int], int]]:
    """Groups of prompts that begin alike up to the end of their last image: their numbers, and tokens up to there."""
    groups: dict[Any, list[int]] = {}
    for number, prompt in enumerate(prompts):
        ids = list(prompt.ids)
        ahead = len(ids) - ids[::-1].index(image) if prompt.images else 0
        key = (tuple(map(id, prompt.images)), tuple(ids[:ahead])) if prompt.images else number
        groups.setdefault((key, ahead), []).append(number)
    return [(rows, ahead) for (_, ahead), rows in groups.items()]


def _copy_shared(
    session: Session,
    prompts: Sequence[Prompt],
    places: Sequence[torch.Tensor],
    shared: Sequence[tuple[list[int], int]],
    slots: int,
    first: torch.Tensor,
) -> None:
    """Compute each group's shared tokens; put their keys and values into the first `slots` slots of its prompts."""
    model = session.model
    leaders = [rows[0] for rows, _ in shared]
    width = max(max(ahead for _, ahead in shared), 1)
    at = torch.arange(width, device=session.device)
    seen = (at <= at.unsqueeze(1)).expand(len(leaders), -1, -1)  # what pads on the right is never looked at
    cache = DynamicCache(config=model.config.get_text_config())
    windows = [(0, min(ahead, width)) for _, ahead in shared]
    _run(session, [prompts[i] for i in leaders], [places[i] for i in leaders], windows, width, cache, seen, left=False)
    group = torch.empty(len(prompts), dtype=torch.int64)
    for number, (rows, _) in enumerate(shared):
        group[rows] = number
    source = (torch.arange(slots, device=session.device) - first.unsqueeze(1)).clamp(0, width - 1)  # [batch, slots]
    group = group.to(session.device).unsqueeze(1)
    layers: list[Any] = list(zip(session.cache.layers, cache.layers, strict=True))
    for layer, own in layers:
        layer.keys[:, :, :slots] = own.keys.transpose(1, 2)[group, source].transpose(1, 2)
        layer.values[:, :, :slots] = own.values.transpose(1, 2)[group, source].transpose(1, 2)


def _run(
    session: Session,
    prompts: Sequence[Prompt],
    places: Sequence[torch.Tensor],
    windows: Sequence[tuple[int, int]],
    width: int,
    cache: Any,
    seen: torch.Tensor,
    left: bool,
) -> torch.Tensor:
    """The decoder's output [rows, width, d] for the tokens `windows` of each prompt, padded on the left or right.

    Args:
        seen: bool [rows, width, slots], the slots of the cache that each token looks at.
    """
    image, device = image_token_id(session.model), session.device
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    positions = torch.zeros(len(places[0]), len(prompts), width, dtype=torch.int64)
    visual = torch.zeros(len(prompts), width, dtype=torch.bool)
    shown: list[list[torch.Tensor]] = []  # by image: what stands there, then what deep layers add
    for row, (prompt, (start, end)) in enumerate(zip(prompts, windows, strict=True)):
        columns = slice(width - (end - start), width) if left else slice(0, end - start)
        whole = torch.tensor(list(prompt.ids))
        ids[row, columns] = whole[start:end]
        positions[:, row, columns] = places[row][:, start:end]
        marks = whole == image
        visual[row, columns] = marks[start:end]
        before, here = int(marks[:start].sum()), int(marks[start:end].sum())
        if int(marks.sum()) != sum(len(each.tokens) for each in prompt.images):
            raise GraceError(
                f"a prompt has {int(marks.sum())} visual tokens where its images make "
                f"{sum(len(each.tokens) for each in prompt.images)}; use the processor of this model"
            )
        if here:
            parts = zip(*((each.tokens, *each.deep) for each in prompt.images), strict=True)
            shown.append([torch.cat(part)[before : before + here] for part in parts])
    embedded = session.embed(ids.to(device))
    more: dict[str, Any] = {}
    if shown:
        visual = visual.to(device)
        tokens, *deep = (torch.cat(part).to(device, embedded.dtype) for part in zip(*shown, strict=True))
        embedded[visual] = tokens
        if deep:
            more = {"visual_pos_masks": visual, "deepstack_visual_embeds": deep}
    return session.decoder(
        inputs_embeds=embedded,
        attention_mask=seen.unsqueeze(1),
        position_ids=(positions if len(positions) > 1 else positions[0]).to(device),
        past_key_values=cache,
        use_cache=True,
        **more,
    ).last_hidden_state
