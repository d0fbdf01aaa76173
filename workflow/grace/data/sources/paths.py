"""Where a record's image lies: inside the source's image folder, or refused."""

import os
from collections.abc import Sequence
from pathlib import Path

from grace.data.sources.record import BadRecord


class ImageFolder:
    """The folder that a source's image paths start from.

    Args:
        folder: as the configuration names it.
        links_into: folders outside, into which symbolic links inside `folder` may lead.
    """

    def __init__(self, folder: str, links_into: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        self._allowed = tuple(os.path.realpath(path) + os.sep for path in (folder, *links_into))

    def find(self, name: str) -> tuple[str, str]:
        """The image's path below the folder, with slashes, and its real file.

        Raises:
            BadRecord: the path is absolute, climbs with `..`, leads outside by a link, or names no regular file.
        """
        if not name or "\0" in name:
            raise BadRecord("image path is empty or has a null character")
        if os.path.isabs(name) or "://" in name or name[1:2] == ":":
            raise BadRecord("image path is not relative", f"{_short(name)}; write it relative to `images`")
        relative = os.path.normpath(name)
        if not self._exists(relative) and "\\" in name:  # written on Windows
            name = name.replace("\\", "/")
            relative = os.path.normpath(name)
        if ".." in name.split("/"):
            raise BadRecord("image path climbs with `..`", _short(name))
        try:
            real = os.path.realpath(self.folder / relative, strict=True)
        except FileNotFoundError:
            raise BadRecord("image is missing", _short(name)) from None
        except (OSError, ValueError) as error:
            raise BadRecord("image path cannot be followed", f"{_short(name)}: {_reason(error)}") from None
        if not (real + os.sep).startswith(self._allowed):
            raise BadRecord("image lies outside the image folder", f"{_short(name)} is a link that leaves it")
        if not os.path.isfile(real):
            raise BadRecord("image is no regular file", _short(name))
        return Path(relative).as_posix(), real

    def _exists(self, relative: str) -> bool:
        try:
            return os.path.lexists(self.folder / relative)
        except ValueError:
            return False


def _short(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:100]}... ({len(name)} characters)"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
