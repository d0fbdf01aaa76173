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
from grace.families import family_of
from grace.infer.decode import Session, best_logprob
from grace.models import image_token_id


@dataclass(frozen=True, eq=False)
class ImageFeatures:
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
    images: Sequence[ImageFeatures] = field(default=())


def image_features(model: Any, pixels: dict[str, torch.Tensor]) -> list[ImageFeatures]:
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
    return [ImageFeatures(*each) for each in zip(made.pooler_output, layers, grids, strict=True)]


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
    laid = _lay(model, prompts)
    shared = _shared(prompts, laid)  # by group: prompts, tokens in front
    rest = max(1, *(lengths[i] - ahead for rows, ahead in shared for i in rows))  # S
    if 2 * len(shared) > len(prompts):
        rest = width  # little is shared: one pass, and no second copy of keys and values
    session._reset()
    first = laid.first.to(device)
    session.first.copy_(first)
    with session._memory():
        if rest < width:
            _copy_shared(session, prompts, laid, shared, width - rest, first)
        layers: list[Any] = session.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(width - rest)
        at = torch.arange(width - rest, width, device=device).unsqueeze(1)  # [S, 1]: slots of the tokens computed now
        seen = (session.slots <= at) & (session.slots >= first[:, None, None]) | (session.slots == at)
        hidden = _run(session, prompts, laid.last(rest), session.cache, seen)[:, -1]
        logits = session.head(hidden).float()
    session.token.copy_(logits.argmax(-1, keepdim=True))
    session.logprob.copy_(best_logprob(logits))
    session.position.copy_(laid.positions.amax((0, 2)) + 1)
    session.slot.fill_(width)
    session.filled = width
    return logits


def follow(session: Session, new_tokens: int) -> Iterator[torch.Tensor]:
    """After `read`: int64 [batch] tokens of the answers, `new_tokens` of them."""
    yield session.token[:, 0].clone()
    for _ in range(1, new_tokens):
        yield session.step()


@dataclass(frozen=True, eq=False)
class _Laid:
    """Parts of prompts, one a row; what pads them is zero.

    Attributes:
        ids: int64 [rows, width].
        positions: int64 [axes, rows, width]; axes are 1, or 3 for time, height and width.
        visual: bool [rows, width], where images stand.
        before: visual tokens of each row's prompt in front of the part.
        first: int64 [rows], the first column that is not padding.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    before: list[int]
    first: torch.Tensor

    def last(self, width: int) -> "_Laid":
        """The last `width` columns."""
        cut = self.ids.shape[1] - width
        return _Laid(
            self.ids[:, cut:], self.positions[:, :, cut:], self.visual[:, cut:], self.visual[:, :cut].sum(1).tolist(),
            (self.first - cut).clamp(min=0),
        )  # fmt: skip

    def leading(self, rows: list[int], counts: list[int]) -> "_Laid":
        """The first so many tokens of some rows, padded behind."""
        at = torch.arange(max(1, *counts))
        columns = (self.first[rows].unsqueeze(1) + at).clamp(max=self.ids.shape[1] - 1)  # [rows, width]
        own = at < torch.tensor(counts).unsqueeze(1)
        rows_ = torch.tensor(rows).unsqueeze(1)
        return _Laid(
            self.ids[rows_, columns] * own, self.positions[:, rows_, columns] * own, self.visual[rows_, columns] & own,
            [0] * len(rows), torch.zeros(len(rows), dtype=torch.int64),
        )  # fmt: skip


def _lay(model: nn.Module, prompts: Sequence[Prompt]) -> _Laid:
    """Whole prompts, padded in front.

    Raises:
        GraceError: a prompt has other visual tokens than its images.
    """
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in prompts])
    first = torch.tensor([width - len(prompt.ids) for prompt in prompts])
    visual = (ids == image_token_id(model)) & (torch.arange(width) >= first.unsqueeze(1))
    for prompt, found in zip(prompts, visual.sum(1).tolist(), strict=True):
        wanted = sum(len(each.tokens) for each in prompt.images)
        if found != wanted:
            raise GraceError(
                f"a prompt has {found} visual tokens where its images make {wanted}; use the processor of this model"
            )
    alike: dict[int, torch.Tensor] = {}  # by length: without a grid nothing else counts
    places = []
    for prompt in prompts:
        gridded = bool(prompt.images) and prompt.images[0].grid is not None
        length = len(prompt.ids)
        if gridded or length not in alike:
            place = nn.functional.pad(_positions(model, prompt), (width - length, 0))
            if not gridded:
                alike[length] = place
        places.append(place if gridded else alike[length])
    return _Laid(ids, torch.stack(places, 1), visual, [0] * len(prompts), first)


def _positions(model: nn.Module, prompt: Prompt) -> torch.Tensor:
    """Positions of the prompt's tokens, [1, tokens], or [3, tokens] with time, height and width."""
    ids = torch.tensor([list(prompt.ids)])
    pixels = {}
    if prompt.images and prompt.images[0].grid is not None:
        pixels = {"image_grid_thw": torch.stack([cast(torch.Tensor, image.grid).cpu() for image in prompt.images])}
    found = family_of(model).positions(model, ids, torch.ones_like(ids), pixels)
    return found[:, 0] if found.dim() == 3 else found


def _shared(prompts: Sequence[Prompt], laid: _Laid) -> list[tuple[list[int], int]]:
    """Groups of prompts that begin alike up to the end of their last image: their numbers, and tokens up to there."""
    groups: dict[Any, list[int]] = {}
    behind = laid.visual.flip(1).int().argmax(1).tolist()  # columns behind the last visual token
    for number, prompt in enumerate(prompts):
        ahead = len(prompt.ids) - behind[number] if prompt.images else 0
        key = (tuple(map(id, prompt.images)), tuple(prompt.ids[:ahead])) if prompt.images else number
        groups.setdefault((key, ahead), []).append(number)
    return [(rows, ahead) for (_, ahead), rows in groups.items()]


def _copy_shared(
    session: Session,
    prompts: Sequence[Prompt],
    laid: _Laid,
    shared: Sequence[tuple[list[int], int]],
    slots: int,
    first: torch.Tensor,
) -> None:
    """Compute each group's shared tokens; put their keys and values into the first `slots` slots of its prompts."""
    model = session.model
    leaders = [rows[0] for rows, _ in shared]
    leading = laid.leading(leaders, [ahead for _, ahead in shared])
    width = leading.ids.shape[1]
    at = torch.arange(width, device=session.device)
    seen = (at <= at.unsqueeze(1)).expand(len(leaders), -1, -1)  # what pads on the right is never looked at
    cache = DynamicCache(config=model.config.get_text_config())
    _run(session, [prompts[i] for i in leaders], leading, cache, seen)
    group = torch.empty(len(prompts), dtype=torch.int64)
    for number, (rows, _) in enumerate(shared):
        group[rows] = number
    source = (torch.arange(slots, device=session.device) - first.unsqueeze(1)).clamp(0, width - 1)  # [batch, slots]
    group = group.to(session.device).unsqueeze(1)
    layers: list[Any] = list(zip(session.cache.layers, cache.layers, strict=True))
    for layer, own in layers:
        layer.keys[:, :, :slots] = own.keys.transpose(1, 2)[group, source].transpose(1, 2)
        layer.values[:, :, :slots] = own.values.transpose(1, 2)[group, source].transpose(1, 2)


def _run(session: Session, prompts: Sequence[Prompt], part: _Laid, cache: Any, seen: torch.Tensor) -> torch.Tensor:
    """The decoder's output [rows, width, d] for a part of each prompt.

    Args:
        seen: bool [rows, width, slots], the slots of the cache that each token looks at.
    """
    device = session.device
    shown: list[list[torch.Tensor]] = []  # by prompt: what stands at its images, then what deep layers add
    for prompt, before, here in zip(prompts, part.before, part.visual.sum(1).tolist(), strict=True):
        if here:
            parts = zip(*((each.tokens, *each.deep) for each in prompt.images), strict=True)
            shown.append([torch.cat(part)[before : before + here] for part in parts])
    embedded = session.embed(part.ids.to(device))
    more: dict[str, Any] = {}
    if shown:
        visual = part.visual.to(device)
        tokens, *deep = (torch.cat(part).to(device, embedded.dtype) for part in zip(*shown, strict=True))
        embedded[visual] = tokens
        if deep:
            more = {"visual_pos_masks": visual, "deepstack_visual_embeds": deep}
    positions = part.positions if len(part.positions) > 1 else part.positions[0]
    return session.decoder(
        inputs_embeds=embedded,
        attention_mask=seen.unsqueeze(1),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=True,
        **more,
    ).last_hidden_state
