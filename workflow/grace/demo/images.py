"""Images of the demo: what is in a scene, drawn at random, and its rendering to 96 x 96 pixels.

Every object stays inside its own 32 x 32 cell of a 3 x 3 grid, since the vision tower makes one token per cell.
"""

import io
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from grace.demo.sources import SPLITS, Sources
from grace.demo.vocabulary import CATEGORIES, COLOURS, DIGITS, GARMENTS, KINDS

SIDE, CELL = 96, 32
SCENES = ("garments", "crowd", "text", "keypad", "degraded")
READABLE_BLUR, UNREADABLE_BLUR = (0.6, 1.5), (2.6, 4.2)
"""Ranges of the blur's standard deviation, in pixels, that leave an object recognisable and that do not."""

_BLURS = np.concatenate([[0.0], np.linspace(0.5, 4.5, 17)])
_TINTS = np.array(list(COLOURS.values()), np.float32)
_TINT_JITTER = 14.0
_CATEGORY_KINDS = [[KINDS.index(garment) for garment in members] for members in CATEGORIES.values()]


@dataclass(frozen=True)
class Thing:
    """One object: indices into KINDS, COLOURS and POSITIONS, the source image's number, and the blur in pixels."""

    kind: int
    colour: int
    cell: int
    crop: int
    blur: float = 0.0

    @property
    def readable(self) -> bool:
        """Whether a viewer can tell what it is."""
        return self.blur < UNREADABLE_BLUR[0]


@dataclass(frozen=True)
class Scene:
    """What an image shows: objects in reading order, the light (1 = full) and the sensor noise (in grey levels)."""

    things: tuple[Thing, ...]
    light: float = 1.0
    noise: float = 6.0

    def source_ids(self, sources: Sources) -> list[str]:
        """The names of the real images in it."""
        return [sources.ids[thing.kind][thing.crop] for thing in self.things]


def generator(seed: int, split: str, stream: str, index: int) -> np.random.Generator:
    """The random numbers of one image: a function of these four and of nothing else."""
    return np.random.default_rng([seed, SPLITS.index(split), zlib.crc32(stream.encode()), index])


def draw_scene(rng: np.random.Generator, scene: str, sources: Sources) -> Scene:
    """Draw what an image of one of `SCENES` shows."""
    if scene == "degraded":
        clear = draw_scene(rng, "text" if rng.random() < 0.3 else "garments", sources)
        return degrade(rng, clear)
    kinds, cells = _LAYOUTS[scene](rng)
    things = [
        Thing(int(kind), int(rng.integers(len(COLOURS))), int(cell), int(rng.integers(len(sources.crops[kind]))))
        for kind, cell in zip(kinds, cells, strict=True)
    ]
    return Scene(tuple(sorted(things, key=lambda thing: thing.cell)), noise=float(rng.uniform(2, 14)))


def _garments(rng):
    count = rng.integers(3, 7)
    return rng.integers(len(GARMENTS), size=count), rng.permutation(9)[:count]


def _crowd(rng):
    focus = _CATEGORY_KINDS[rng.integers(len(_CATEGORY_KINDS))]
    inside, others = rng.integers(1, 6), rng.integers(1, 5)
    kinds = np.concatenate([rng.choice(focus, size=inside), rng.integers(len(GARMENTS), size=others)])
    return kinds, rng.permutation(9)[: len(kinds)]


def _text(rng):
    row, length = rng.integers(3), rng.integers(1, 4)
    written = row * 3 + rng.integers(0, 4 - length) + np.arange(length)
    others = rng.permutation([cell for cell in range(9) if cell // 3 != row])[: rng.integers(0, 4)]
    kinds = np.concatenate(
        [len(GARMENTS) + rng.integers(len(DIGITS), size=length), rng.integers(len(GARMENTS), size=len(others))]
    )
    return kinds, np.concatenate([written, others])


def _keypad(rng):
    count = rng.integers(3, 8)
    return len(GARMENTS) + rng.integers(len(DIGITS), size=count), rng.permutation(9)[:count]


_LAYOUTS = {"garments": _garments, "crowd": _crowd, "text": _text, "keypad": _keypad}


def degrade(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same scene in poor light, with more noise, every object blurred, some beyond recognition."""
    # A written number is blurred as a whole: half of it readable would be a question about another number.
    number_lost = rng.random() < 0.5
    things = []
    for thing in scene.things:
        lost = number_lost if thing.kind >= len(GARMENTS) else rng.random() < 0.35
        blur = rng.uniform(*(UNREADABLE_BLUR if lost else READABLE_BLUR))
        things.append(Thing(thing.kind, thing.colour, thing.cell, thing.crop, float(blur)))
    return Scene(tuple(things), light=float(rng.uniform(0.35, 1.0)), noise=float(rng.uniform(4, 22)))


@cache
def _blur_matrices() -> np.ndarray:
    # [sigmas, 32, 32]: one pass of a Gaussian along a cell's side. Rows sum to less than 1 near the border, as light
    # that leaves the cell is lost: no object reaches into its neighbour's token.
    distance = np.arange(CELL)[:, None] - np.arange(CELL)[None, :]
    kernels = [np.eye(CELL, dtype=np.float32)]
    for sigma in _BLURS[1:]:
        profile = np.exp(-0.5 * (np.arange(-CELL, CELL + 1) / sigma) ** 2)
        kernels.append((np.exp(-0.5 * (distance / sigma) ** 2) / profile.sum()).astype(np.float32))
    return np.stack(kernels)


@cache
def _noise_bank() -> np.ndarray:
    # Fixed normal noise that every image takes a random window of: far cheaper than 27,648 new normals per image.
    return np.random.default_rng(0).standard_normal((512, 512, 3), dtype=np.float32)


def _background(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    texture = sources.textures[rng.integers(len(sources.textures))]
    top, left = rng.integers(texture.shape[0] - SIDE + 1), rng.integers(texture.shape[1] - SIDE + 1)
    window = texture[top : top + SIDE, left : left + SIDE]
    flips = rng.integers(2, size=2) * 2 - 1
    return window[:: flips[0], :: flips[1]].astype(np.float32) * rng.uniform(0.2, 0.45)


def _layers(rng: np.random.Generator, scene: Scene, sources: Sources) -> np.ndarray:
    # float32 [things, 32, 32, 4]: red, green and blue times opacity, then opacity
    count = len(scene.things)
    grey = np.stack([sources.crops[thing.kind][thing.crop] for thing in scene.things]).astype(np.float32) / 255
    mirrored = (rng.random(count) < 0.5) & np.array([thing.kind < len(GARMENTS) for thing in scene.things])
    grey[mirrored] = grey[mirrored, :, ::-1]
    tints = _TINTS[[thing.colour for thing in scene.things]]
    tints = np.clip(tints + rng.normal(0, _TINT_JITTER, (count, 3)).astype(np.float32), 0, 255)
    opacity = np.minimum(1, grey * 6)
    shade = opacity * (0.25 + 0.75 * grey)
    layers = np.zeros((count, CELL, CELL, 4), np.float32)
    offsets = rng.integers(0, CELL - 28 + 1, size=(count, 2))
    for n, (y, x) in enumerate(offsets):
        placed = layers[n, y : y + 28, x : x + 28]
        np.multiply(shade[n, :, :, None], tints[n], out=placed[..., :3])
        placed[..., 3] = opacity[n]
    for n, thing in enumerate(scene.things):
        if thing.blur:
            blur = _blur_matrices()[np.abs(_BLURS - thing.blur).argmin()]
            layers[n] = np.tensordot(
                blur, (blur @ layers[n].reshape(CELL, -1)).reshape(CELL, CELL, 4), (1, 1)
            ).transpose(1, 0, 2)
    return layers


def render(rng: np.random.Generator, scene: Scene, sources: Sources) -> np.ndarray:
    """Draw the image of a scene: uint8 [96, 96, 3]."""
    canvas = _background(rng, sources)
    if scene.things:
        for thing, layer in zip(scene.things, _layers(rng, scene, sources), strict=True):
            y, x = CELL * (thing.cell // 3), CELL * (thing.cell % 3)
            cell = canvas[y : y + CELL, x : x + CELL]
            cell *= 1 - layer[..., 3:]
            cell += layer[..., :3]
    y, x = rng.integers(512 - SIDE, size=2)
    canvas *= scene.light
    canvas += scene.noise * _noise_bank()[y : y + SIDE, x : x + SIDE]
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def encode(image: np.ndarray) -> bytes:
    """The image as JPEG of quality 92."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()
