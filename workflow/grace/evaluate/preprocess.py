"""Padding; and preprocessing of same-sized images by look-up, where the processor treats every pixel alone.

A processor that neither resizes nor crops images of a size, as the demo's does with its own, maps each channel's 256
values to 256 numbers. These are read off the processor itself, and the shortcut is taken only after it has reproduced
the processor's output for a real image of that size bit for bit.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image


class Pixels:
    """What `processor.image_processor` makes of images: `pixel_values`, for Qwen also `image_grid_thw`."""

    def __init__(self, image_processor) -> None:
        self.image_processor = image_processor
        self._tables: dict[tuple[int, int], np.ndarray | None] = {}  # size -> [3, 256] float32, or None: no shortcut

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """RGB images to what the model's vision side takes."""
        size = images[0].size
        if any(image.size != size for image in images):
            return self._slowly(images)
        if size not in self._tables:
            self._tables[size] = self._table(images[0])
        table = self._tables[size]
        if table is None:
            return self._slowly(images)
        return {"pixel_values": torch.from_numpy(self._look_up(table, images))}

    def _slowly(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        return dict(self.image_processor(images=list(images), return_tensors="pt"))

    @staticmethod
    def _look_up(table: np.ndarray, images: Sequence[Image.Image]) -> np.ndarray:
        pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])  # [images, 3, height, width]
        made = np.empty(pixels.shape, np.float32)
        for channel in range(3):
            np.take(table[channel], pixels[:, channel], out=made[:, channel], mode="clip")
        return made

    def _table(self, image: Image.Image) -> np.ndarray | None:
        width, height = image.size
        if width * height < 256:
            return None
        ramp = np.resize(np.arange(256, dtype=np.uint8), (height, width))
        made = self._slowly([Image.fromarray(np.stack([ramp] * 3, axis=-1))])["pixel_values"].numpy()
        if made.shape != (1, 3, height, width):
            return None
        table = made.reshape(3, -1)[:, :256].copy()
        same = np.array_equal(self._look_up(table, [image]), self._slowly([image])["pixel_values"].numpy())
        return table if same else None


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The image in the middle of a square of the processor's mean colour, as LLaVA-1.5 was trained and evaluated.

    Args:
        image: RGB.
        mean: `image_mean`, 0..1 by channel.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    padded = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    padded.paste(image, ((side - width) // 2, (side - height) // 2))
    return padded
