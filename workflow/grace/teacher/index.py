"""`index.safetensors` of a cache: every record's key, place and sum of gates, sorted by key.

Small enough to be read for every step: what a global batch is divided by needs no record.
    keys uint8 [records, 32], shards int32 [records], records int32 [records], gate_sums fp64 [records]
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grace.errors import GraceError, reason
from grace.files import whole_file
from grace.hashes import known_sha256
from grace.teacher.shard import Shard, damage

INDEX_FILE = "index.safetensors"
_AGAIN = "run `grace cache finish` again"


def write_index(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """Write the index of the shards that these sidecars, or parts of a manifest, describe.

    Of equal keys the first one's place is kept.
    """
    keys, places, records, sums = [], [], [], []
    for number, entry in enumerate(shards):
        shard = Shard(folder, entry)
        count = len(shard.keys())
        keys.append(shard.keys().numpy())
        places.append(np.full(count, number, np.int32))
        records.append(np.arange(count, dtype=np.int32))
        sums.append([float(shard.tokens(record, "gates").double().sum()) for record in range(count)])
    every = np.concatenate([np.zeros((0, 32), np.uint8), *keys])
    _, order = np.unique(_sortable(every), return_index=True)
    tensors = {
        "keys": every[order],
        "shards": np.concatenate([np.zeros(0, np.int32), *places])[order],
        "records": np.concatenate([np.zeros(0, np.int32), *records])[order],
        "gate_sums": np.concatenate([np.zeros(0), *map(np.array, sums)])[order].astype(np.float64),
    }
    with whole_file(folder / INDEX_FILE) as part:
        save_file({name: torch.from_numpy(value) for name, value in tensors.items()}, part)


def _sortable(keys: np.ndarray) -> np.ndarray:
    """uint8 [n, 32] as byte strings [n]."""
    return np.ascontiguousarray(keys).view("S32")[:, 0]


class Index:
    """A cache's index, read whole: 48 bytes a record.

    Attributes:
        shards, records: int32 [records], where each is.
        gate_sums: fp64 [records], the sum of its gates.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any] | None) -> None:
        """`entry` is what the manifest says of the file; a `GraceError` where it is missing or damaged."""
        if entry is None:
            raise GraceError(f"{folder}: has no {INDEX_FILE}; {_AGAIN}")
        problem = damage(folder, {"file": INDEX_FILE, **entry}, known_sha256)
        if problem:
            raise GraceError(f"{folder}: {problem}; {_AGAIN}")
        try:
            tensors = {name: tensor.numpy() for name, tensor in load_file(folder / INDEX_FILE).items()}
        except (OSError, SafetensorError) as error:
            raise GraceError(f"{folder / INDEX_FILE}: damaged ({reason(error)}); {_AGAIN}") from error
        self._keys = _sortable(tensors["keys"])
        self.shards, self.records, self.gate_sums = (tensors[name] for name in ("shards", "records", "gate_sums"))

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """The number of each key's record, int64 [keys]; -1 where there is none."""
        wanted = _sortable(np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 32))
        at = np.searchsorted(self._keys, wanted)
        if not len(self._keys):
            return np.full(len(keys), -1)
        return np.where(self._keys[np.minimum(at, len(self._keys) - 1)] == wanted, at, -1)
