"""Make `data/garments.npz` again from Fashion-MNIST's own files.

`python -m grace.demo.vendor FOLDER`, where FOLDER holds the four idx files as its authors publish them, for example
`/usr/share/datasets/fashion-mnist` of Debian's package dataset-fashion-mnist.
"""

import gzip
import sys
from pathlib import Path

import numpy as np

from grace.demo.sources import GARMENTS_FILE, SPLITS
from grace.files import whole_file

PER_CLASS = {"train": 800, "development": 60, "test": 140}
"""Train and development come from the official training set, test from the official test set."""


def _idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def vendor(folder: Path, out: Path = GARMENTS_FILE) -> None:
    """Write a balanced choice of garments: `images` [n, 28, 28], `labels` [n], `splits` [n], `official` [n].

    The first garments of each class are taken in the official order, each image once (the official files hold a few
    exact duplicates), so that the result depends on nothing but those files.
    """
    seen: set[bytes] = set()
    rows = []
    for prefix, splits in (("train", ("train", "development")), ("t10k", ("test",))):
        images = _idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8)
        left = {(split, label): PER_CLASS[split] for split in splits for label in range(10)}
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            split = next((s for s in splits if left[s, int(label)]), None)
            if split is None or image.tobytes() in seen:
                continue
            seen.add(image.tobytes())
            left[split, int(label)] -= 1
            rows.append((image, label, SPLITS.index(split), index))
    image, label, split, official = (np.stack(column) for column in zip(*rows, strict=True))
    with whole_file(out) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            images=image,
            labels=label.astype(np.uint8),
            splits=split.astype(np.uint8),
            official=official.astype(np.uint16),
        )


if __name__ == "__main__":
    vendor(Path(sys.argv[1]))
