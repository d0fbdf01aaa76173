"""Reading a cache: records by key, as training asks for them.

Files are memory-mapped, so a cache may be larger than memory. A shard's size is checked when the cache is opened and
its checksum when its first record is read, once per machine for as long as the file is not touched: no number from a
damaged file reaches a loss.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from grace.errors import GraceError, reason
from grace.files import MANIFEST
from grace.teacher.formats import decode_int8
from grace.teacher.identity import differences
from grace.teacher.index import INDEX_FILE, Index
from grace.teacher.manifest import read_cache_manifest
from grace.teacher.sampled import SampledRecord
from grace.teacher.shard import REBUILD, Shard, damage

HEAD_FILE, AUDIT_FILE = "teacher_head.safetensors", "audit.safetensors"


@dataclass
class CachedTargets:
    """What the teacher said of some conversations, one after the other.

    Attributes:
        keys: the records, in the order asked for.
        counts: supervised tokens of each.
        gates: fp32 [tokens].
        hidden: bf16 [tokens, d_T], the teacher's last hidden states; None in a `sampled` cache.
        sampled: the sampled record of these tokens; None in the other formats.
        grams: per image of these conversations, fp32 [n, n], the Gram matrix of its l2-normalised visual tokens.
    """

    keys: list[str]
    counts: list[int]
    gates: torch.Tensor
    hidden: torch.Tensor | None
    sampled: SampledRecord | None
    grams: list[torch.Tensor]

    def to(self, device: torch.device | str) -> "CachedTargets":
        """The same targets on another device; from pinned memory without waiting for the copies."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "CachedTargets":
        """The same targets in page-locked memory, from which a GPU copies while it computes."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "CachedTargets":
        hidden = None if self.hidden is None else change(self.hidden)
        sampled = None if self.sampled is None else self.sampled.each(change)
        grams = [change(matrix) for matrix in self.grams]
        return CachedTargets(self.keys, self.counts, change(self.gates), hidden, sampled, grams)


class TeacherCache:
    """A finished cache.

    Attributes:
        folder, manifest: where it is, and its manifest.json.
        format: "hidden", "hidden-int8" or "sampled".
        vocabulary, width: V and d_T of the teacher.
        temperature: T of a `sampled` cache, else None.
        records, tokens: how many records and supervised tokens it holds.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.format: str = manifest["format"]
        self.vocabulary: int = manifest["vocabulary"]
        self.width: int = manifest["width"]
        self.temperature: float | None = manifest["temperature"]
        self.records: int = manifest["records"]
        self.tokens: int = manifest["supervised_tokens"]
        for entry in manifest["shards"]:
            problem = damage(folder, entry, None)
            if problem:
                raise GraceError(f"{folder}: {problem}; {REBUILD}")
        self.shards = [Shard(folder, entry) for entry in manifest["shards"]]
        self.index = Index(folder, manifest["files"].get(INDEX_FILE))
        self._head: torch.Tensor | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | Path, expect: Mapping[str, Any] | None = None, verify: bool = False) -> "TeacherCache":
        """Open a finished cache.

        Args:
            folder: the cache's folder.
            expect: pins that the manifest must share, as from `grace.teacher.identity.expected`; `temperature` counts
                for a `sampled` cache alone.
            verify: check every shard's checksum now instead of on first use.

        Raises:
            GraceError: no manifest; a pin differs (the sentence says which and how); a shard is missing or damaged.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise GraceError(
                f"{folder}: not a finished cache (no {MANIFEST}); run `grace cache finish`, or check the path"
            )
        manifest = read_cache_manifest(folder)
        different = differences(manifest, dict(expect or {}))
        if different:
            raise GraceError(
                f"{folder}: the cache was made with {' and '.join(different)}; write it again for this run, or point "
                "to another"
            )
        cache = cls(folder, manifest)
        if verify:
            cache.verify()
        return cache

    @property
    def head(self) -> torch.Tensor:
        """The teacher's vocabulary projection [V, d_T], in the dtype that the teacher ran in; read on first use."""
        with self._lock:
            if self._head is None:
                problem = damage(self.folder, {"file": HEAD_FILE, **self.manifest["files"][HEAD_FILE]})
                if problem:
                    raise GraceError(f"{self.folder}: {problem}; run `grace cache finish` again")
                self._head = load_file(self.folder / HEAD_FILE)["weight"]
            return self._head

    def batch(self, keys: Sequence[str]) -> CachedTargets:
        """The records of `keys`, concatenated in this order.

        Raises:
            GraceError: a record is not there, or its shard is damaged.
        """
        places = [self._place(number) for number in self._numbers(keys)]
        with self._lock:
            for shard, _ in places:
                shard.verify()

        def tokens(name: str) -> torch.Tensor:
            return torch.cat([shard.tokens(record, name) for shard, record in places])

        gates = tokens("gates")
        hidden = sampled = None
        if self.format == "hidden":
            hidden = tokens("hidden")
        elif self.format == "hidden-int8":
            hidden = decode_int8(tokens("hidden.codes"), tokens("hidden.scales"))
        else:
            names = ("log_odds", "negentropy", "log_tail", "entries")
            parts = {name: tokens(name) for name in names}
            sampled = SampledRecord(gates=gates, vocabulary=self.vocabulary, **parts)
        return CachedTargets(
            list(keys),
            [shard.count(record) for shard, record in places],
            gates,
            hidden,
            sampled,
            [matrix for shard, record in places for matrix in shard.grams(record)],
        )

    def gate_sum(self, keys: Sequence[str]) -> float:
        """Sum of the gates of all supervised tokens of `keys`: what gated DKD is divided by."""
        return sum(self.index.gate_sums[self._numbers(keys)].tolist())

    def check_keys(self, keys: Iterable[str]) -> None:
        """Refuse conversations without a record, before the first step rather than in the middle of a run."""
        waiting = iter(keys)
        while some := list(islice(waiting, 4096)):
            self._numbers(some)

    def _numbers(self, keys: Sequence[str]) -> np.ndarray:
        """Where the records stand in the index: int64 [keys]."""
        found = self.index.find(keys)
        if (found < 0).any():
            with self._lock:
                for shard in self.shards:  # a damaged key is damage, not a missing record
                    shard.verify()
            raise GraceError(
                f"{self.folder}: no record of the conversation with key {keys[int(found.argmin())][:12]}…; the cache "
                "was written for other data, or for another tokenizer: write it again"
            )
        return found

    def _place(self, number: int) -> tuple[Shard, int]:
        return self.shards[self.index.shards[number]], int(self.index.records[number])

    def verify(self) -> None:
        """Check the checksum of every file of the cache; a `GraceError` names every bad one."""
        check_files(self.folder, self.manifest)


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Re-hash every file that a cache's manifest lists; a `GraceError` names every bad one and the fix."""
    entries = [{"file": name, **entry} for name, entry in manifest["files"].items()]
    problems = [problem for entry in entries if (problem := damage(folder, entry))]
    if problems:
        raise GraceError(
            f"{folder}: {'; '.join(problems)}; run `grace cache write` for the shards named, then `grace cache finish`"
        )


def load_audit(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a cache's audit file."""
    try:
        return load_file(folder / AUDIT_FILE)
    except (OSError, SafetensorError) as error:
        raise GraceError(
            f"{folder / AUDIT_FILE}: missing or damaged ({reason(error)}); run `grace cache finish` again"
        ) from error
