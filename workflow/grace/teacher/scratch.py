"""Tensors that are filled bit by bit and may be larger than memory: beyond a size they lie in files that have no name.

A file that nobody can open again is gone with its process, however that ends.
"""

import os
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch

IN_MEMORY = 2**26  # bytes of a tensor that needs no file


def _as_integers(dtype: torch.dtype) -> tuple[torch.dtype, np.dtype]:
    """A torch and a numpy dtype of the same width, for dtypes that numpy lacks."""
    width = torch.empty(0, dtype=dtype).element_size()
    name = f"int{8 * width}"
    return getattr(torch, name), np.dtype(name)


def empty(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """A tensor without values, in a file below `folder` if it is large; OSError where the disk has no room."""
    size = torch.empty(0, dtype=dtype).element_size() * int(np.prod(shape))
    if folder is None or size <= IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and a signal once it is mapped
        mapped = np.memmap(file, _as_integers(dtype)[1], "r+", shape=shape)  # keeps what it maps
    return torch.from_numpy(mapped).view(dtype)


class Growing:
    """A tensor that pieces are appended to along its first dimension; in a file below `folder` once it is large."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._pieces: list[torch.Tensor] = []
        self._bytes = self._rows = 0
        self._file: IO[bytes] | None = None

    def append(self, piece: torch.Tensor) -> None:
        """Add rows [n, ...], of the dtype and the shape of those before."""
        self._pieces.append(piece)
        self._bytes += piece.nbytes
        self._rows += len(piece)
        if self._folder is not None and self._bytes > IN_MEMORY:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (closed with its process or this object)
            for waiting in self._pieces:
                integers, _ = _as_integers(waiting.dtype)
                self._file.write(waiting.contiguous().view(integers).numpy().tobytes())
            self._pieces = [self._pieces[-1][:0]]  # whose dtype and shape are known by

    def finished(self) -> torch.Tensor:
        """All rows [sum of n, ...]; nothing may be appended any more."""
        if self._file is None:
            return torch.cat(self._pieces)
        self._file.flush()
        like = self._pieces[0]
        mapped = np.memmap(self._file, _as_integers(like.dtype)[1], "c", shape=(self._rows, *like.shape[1:]))
        return torch.from_numpy(mapped).view(like.dtype)
