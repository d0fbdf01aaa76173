"""One encoded image, kept in the Parquet file (the demo) or in a file beside it (data sets of real size)."""

import hashlib
import json
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from grace.data.decode import Unreadable, decode, read_header
from grace.errors import GraceError

FOLDERS = "image_folders.json"
"""In a data folder: where the image folders lie on this machine, by the first part of the images' `path`."""


@lru_cache
def _folders(data: Path) -> dict[str, str]:
    try:
        return json.loads((data / FOLDERS).read_text())
    except FileNotFoundError:
        return {}


def image_file(data: Path, path: str) -> str:
    """The file of an image that `data`/train.parquet names: its image folder's number, then the path inside."""
    number, _, inside = path.partition("/")
    folder = _folders(data).get(number)
    return path if folder is None else str(Path(folder) / inside)


def read_regular(path: str | Path) -> bytes:
    """A regular file's bytes; raises OSError for anything else, so that no pipe or device is waited for."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError("not a regular file")
    return Path(path).read_bytes()


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image; exactly one of `data` and `path` is set.

    Attributes:
        name: what error messages call it.
        data: the encoded bytes, of one of `decode.FORMATS`.
        path: the file that holds them.
        sha256: of these bytes, hex.
        shape: height and width in pixels as it is shown, where they are known already.
    """

    name: str
    data: bytes | None
    path: str | None
    sha256: str
    shape: tuple[int, int] | None = None

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> "EncodedImage":
        """An image held in memory."""
        return cls(name, data, None, hashlib.sha256(data).hexdigest())

    def read(self) -> bytes:
        """The encoded bytes; a `GraceError` where the file is missing or no longer the one that was prepared."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            data = read_regular(self.path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise GraceError(
                f"{self.path}: the image of {self.name} cannot be read ({reason}); bring it back, or correct "
                "data.sources and build the data again: `snakemake --forcerun prepare`"
            ) from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise GraceError(
                f"{self.path}: not the image that was prepared for {self.name}; bring the old file back, or "
                "build the data again: `snakemake --forcerun prepare`"
            )
        return data

    def _refused(self, error: Unreadable) -> GraceError:
        where = f"{self.path} ({self.name})" if self.path else self.name
        return GraceError(f"image of {where}: cannot be read: {error}; replace it or leave the row out")

    def size(self) -> tuple[int, int]:
        """Height and width in pixels as it is shown, from the header alone."""
        if self.shape is not None:
            return self.shape
        try:
            header = read_header(self.read())
        except Unreadable as error:
            raise self._refused(error) from error
        return header.height, header.width

    def open(self) -> Image.Image:
        """The decoded image, RGB, as a viewer shows it (`decode`); a `GraceError` names one that cannot be read."""
        try:
            return decode(self.read())[0]
        except Unreadable as error:
            raise self._refused(error) from error
