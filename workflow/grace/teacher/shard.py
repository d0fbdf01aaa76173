"""One shard: a safetensors file of concatenated records, and a JSON sidecar that says when it is whole.

The file holds
    keys            uint8 [records, 32]     SHA-256 of each record's tokens and image
    token_offsets   int64 [records + 1]     where each record's supervised tokens stand
    gates           fp32 [tokens]
    hidden | hidden.codes, hidden.scales | log_odds, negentropy, log_tail, entries      [tokens, ...], by format
    image_offsets   int64 [records + 1]     where each record's images stand; a record of text alone has none
    gram_of_image   int32 [images]          which of the shard's Gram matrices; images share one where they may
    gram.sizes      int32 [grams]           visual tokens n
    gram.codes int8, gram.scales fp16, gram.diagonal fp16, gram.offset fp32     `formats.encode_gram`, concatenated
    audit.records   int32 [audited]         records also kept in full precision:
    audit.labels    int64, audit.hidden fp32 [tokens of these, d_T], audit.grams fp32 [sum of n² over their images]
The sidecar is written last, so a shard without a sidecar that fits it is a shard to write again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from grace.errors import GraceError, reason
from grace.files import sha256, whole_file, write_json
from grace.hashes import known_sha256
from grace.teacher.formats import decode_gram, encode_gram
from grace.teacher.scratch import Growing, empty

REBUILD = "run `grace cache write` for this shard again, then `grace cache finish`"


def shard_name(number: int, shards: int) -> str:
    """The file name of shard `number` (from 0) of `shards`, without its ending."""
    return f"shard-{number:05d}-of-{shards:05d}"


def shard_range(examples: int, number: int, shards: int) -> range:
    """The indices of the training conversations that belong to a shard: contiguous, and as even as can be."""
    if not 0 <= number < shards:
        raise GraceError(f"--shard {number}: the run has shards 0 to {shards - 1} (cache.shards)")
    return range(examples * number // shards, examples * (number + 1) // shards)


class ShardBuilder:
    """Collects the records of a shard in any order; what is large lies in nameless files below `scratch`, if given."""

    def __init__(self, keys: Sequence[str], counts: Sequence[int], scratch: Path | None = None) -> None:
        """`counts[i]` is the number of supervised tokens of record `keys[i]`."""
        self.scratch = scratch
        self.keys = torch.frombuffer(bytearray(bytes.fromhex("".join(keys))), dtype=torch.uint8) if keys else None
        self.offsets = torch.tensor([0, *counts]).cumsum(0)
        self.tokens: dict[str, torch.Tensor] = {}
        self.gram_of_image: list[list[int]] = [[] for _ in keys]
        self.grams: dict[str, int] = {}
        self.gram_parts: dict[str, Growing] = {}
        self.gram_sizes: list[int] = []
        self.audit: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def put(self, record: int, **values: torch.Tensor) -> None:
        """Set a record's per-token tensors [tokens, ...]."""
        begin, end = self.offsets[record], self.offsets[record + 1]
        for name, value in values.items():
            if name not in self.tokens:
                shape = (int(self.offsets[-1]), *value.shape[1:])
                self.tokens[name] = empty(shape, value.dtype, self.scratch)
            self.tokens[name][begin:end] = value

    def put_grams(self, record: int, identities: Sequence[str], matrices: Sequence[torch.Tensor]) -> None:
        """Set the Gram matrices [n, n] of a record's images; images of one identity share the first one given."""
        for identity, matrix in zip(identities, matrices, strict=True):
            if identity not in self.grams:
                self.grams[identity] = len(self.gram_sizes)
                self.gram_sizes.append(len(matrix))
                for name, part in encode_gram(matrix).items():
                    self.gram_parts.setdefault(name, Growing(self.scratch)).append(part.cpu())
            self.gram_of_image[record].append(self.grams[identity])

    def put_audit(
        self, record: int, labels: torch.Tensor, states: torch.Tensor, matrices: Sequence[torch.Tensor]
    ) -> None:
        """Keep a record in full precision too: labels [tokens], states fp32 [tokens, d_T], Gram fp32 [n,
        n] per image.
        """
        grams = torch.cat([torch.zeros(0), *(matrix.float().flatten().cpu() for matrix in matrices)])
        self.audit[record] = (labels.cpu(), states.float().cpu(), grams)

    def finished(self) -> dict[str, torch.Tensor]:
        """The shard's tensors; empty for a shard without records."""
        if self.keys is None:
            return {}
        tensors = {
            "keys": self.keys.view(-1, 32),
            "token_offsets": self.offsets,
            "image_offsets": torch.tensor([0, *map(len, self.gram_of_image)]).cumsum(0),
            "gram_of_image": torch.tensor([which for own in self.gram_of_image for which in own], dtype=torch.int32),
            "gram.sizes": torch.tensor(self.gram_sizes, dtype=torch.int32),
            **self.tokens,
            **{f"gram.{name}": parts.finished() for name, parts in self.gram_parts.items()},
        }
        if self.audit:
            audited = sorted(self.audit)
            tensors["audit.records"] = torch.tensor(audited, dtype=torch.int32)
            for position, name in enumerate(("labels", "hidden", "grams")):
                tensors[f"audit.{name}"] = torch.cat([self.audit[record][position] for record in audited])
        return tensors


def write_shard(folder: Path, name: str, tensors: dict[str, torch.Tensor], **about: Any) -> None:
    """Write a shard and then its sidecar, each under a temporary name first; `about` goes into the sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{name}.*.part"):  # by a writer of this shard that was killed
        left.unlink(missing_ok=True)
    path = folder / f"{name}.safetensors"
    path.with_suffix(".json").unlink(missing_ok=True)
    try:
        with whole_file(path) as part:
            save_file(tensors, part)
    except SafetensorError as error:
        raise GraceError(f"{path}: could not be written ({reason(error)}); free space and run again") from error
    records = len(tensors["keys"]) if tensors else 0
    entry = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "records": records,
        "grams": len(tensors["gram.sizes"]) if tensors else 0,
        "audited": len(tensors["audit.records"]) if "audit.records" in tensors else 0,
        "tokens": int(tensors["token_offsets"][-1]) if tensors else 0,
        "gate_sum": float(tensors["gates"].double().sum()) if tensors else 0.0,
    }
    write_json(path.with_suffix(".json"), {**about, **entry})


def damage(folder: Path, entry: dict[str, Any], hashed: Callable[[Path], str] | None = sha256) -> str | None:
    """What is wrong with a file that a sidecar or manifest `entry` describes, or None; without `hashed`,
    by size alone.
    """
    path = folder / entry["file"]
    if not path.is_file():
        return f"{entry['file']} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{entry['file']} has {size} of {entry['bytes']} bytes"
    if hashed is not None and hashed(path) != entry["sha256"]:
        return f"{entry['file']} does not have the bytes that were written (its checksum differs)"
    return None


class Shard:
    """A written shard, memory-mapped: tensors are read from the disk when they are looked at."""

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        """`entry` is the shard's sidecar or its part of the manifest.
        Neither checks the file's bytes nor reads records.
        """
        self.folder, self.entry = folder, entry
        self.verified = False
        path = folder / entry["file"]
        try:
            with safe_open(path, "pt") as file:
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
            if not entry["records"]:
                return
            sizes = self.tensors["gram.sizes"].long()
            self.offsets = self.tensors["token_offsets"].numpy()
            self.images = self.tensors["image_offsets"].numpy()
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise GraceError(f"{path}: damaged ({reason(error)}); {REBUILD}") from error
        self.rows = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).numpy()
        self.pairs = torch.cat([sizes.new_zeros(1), (sizes * (sizes - 1) // 2).cumsum(0)]).numpy()

    def verify(self) -> None:
        """Compare the file's checksum, once per machine; a `GraceError` names a damaged shard."""
        if self.verified:
            return
        problem = damage(self.folder, self.entry, known_sha256)
        if problem:
            raise GraceError(f"{self.folder}: {problem}; {REBUILD}")
        self.verified = True

    def keys(self) -> torch.Tensor:
        """The records' keys uint8 [records, 32], in order."""
        return self.tensors["keys"] if self.tensors else torch.zeros(0, 32, dtype=torch.uint8)

    def count(self, record: int) -> int:
        """How many supervised tokens a record has."""
        return int(self.offsets[record + 1] - self.offsets[record])

    def tokens(self, record: int, name: str) -> torch.Tensor:
        """A record's part [tokens, ...] of a per-token tensor."""
        return self.tensors[name][self.offsets[record] : self.offsets[record + 1]]

    def grams(self, record: int) -> list[torch.Tensor]:
        """The Gram matrices of a record's images, each fp32 [n, n]."""
        return [
            self._gram(which)
            for which in self.tensors["gram_of_image"][slice(*self.images[record : record + 2])].tolist()
        ]

    def _gram(self, which: int) -> torch.Tensor:
        rows, pairs = slice(*self.rows[which : which + 2]), slice(*self.pairs[which : which + 2])
        return decode_gram(
            {
                "codes": self.tensors["gram.codes"][pairs],
                "scales": self.tensors["gram.scales"][rows],
                "diagonal": self.tensors["gram.diagonal"][rows],
                "offset": self.tensors["gram.offset"][which : which + 1],
            }
        )
