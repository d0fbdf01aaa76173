"""One encoded image, kept in the Parquet file (the demo) or in a file beside it (data sets of real size)."""

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from grace.errors import GraceError


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image; exactly one of `data` and `path` is set.

    Attributes:
        name: what error messages call it.
        data: JPEG or PNG bytes.
        path: the file that holds them.
        sha256: of these bytes, hex.
    """

    name: str
    data: bytes | None
    path: str | None
    sha256: str

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> "EncodedImage":
        """An image held in memory."""
        return cls(name, data, None, hashlib.sha256(data).hexdigest())

    def _open(self) -> Image.Image:
        return Image.open(BytesIO(self.data) if self.data is not None else Path(self.path))

    def _unreadable(self, error: Exception) -> GraceError:
        where = f"{self.path} ({self.name})" if self.path else self.name
        return GraceError(f"image of {where}: cannot be read ({error}); replace it or leave the row out")

    def size(self) -> tuple[int, int]:
        """Height and width in pixels, from the header alone."""
        try:
            with self._open() as image:
                return image.height, image.width
        except (OSError, SyntaxError, ValueError) as error:
            raise self._unreadable(error) from error

    def open(self) -> Image.Image:
        """The decoded image, RGB; a `GraceError` names one that cannot be read."""
        try:
            with self._open() as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise self._unreadable(error) from error
