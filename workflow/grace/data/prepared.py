"""What every training job would otherwise compute again: token ids, labels and the frozen tower's features.

Nothing of it is read before it is asked for, so that a job's memory does not grow with the conversations but for some
bytes of each.

The tower is frozen, so its output for an image is the same in every step of every run. For the demo's 9 visual
tokens it is 2 KB per image and kept; for LLaVA-1.5's 576 it would be 1.2 MB, so data sets of real size keep token
ids alone and run the tower.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

from grace.data.conversations import SCHEMA, as_row, load_conversations
from grace.data.examples import Example, Tokeniser
from grace.data.images import EncodedImage
from grace.data.index import FILE as INDEX
from grace.data.index import Index, IndexWriter
from grace.errors import GraceError, reason
from grace.files import sha256, whole_file
from grace.hashes import known_sha256
from grace.progress import progress

FILE = "examples.safetensors"
BATCH = 256
KEPT = 4096  # examples that were asked for last


def tower_hash(tower: nn.Module) -> str:
    """SHA-256 over the tower's weights on bf16's grid, which is how every checkpoint keeps them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _features(tower: nn.Module, processor, images: list[EncodedImage]) -> torch.Tensor:
    """The tower's last hidden state [images, n, d] in its dtype."""
    pixels = processor.image_processor(images=[p.open() for p in images], return_tensors="pt")["pixel_values"]
    return tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states[-1]


def prepare_examples(folder: Path, processor, tower: Path | None) -> None:
    """Write `folder/examples.safetensors` and index.arrow from train.parquet there; with a tower, its features too."""
    conversations = load_conversations(folder / "train.parquet")
    tokeniser = Tokeniser(processor)
    vision = None
    if tower is not None:
        vision = AutoModel.from_pretrained(tower, dtype=torch.float32, local_files_only=True).eval()
    examples: list[Example] = []
    features = []
    with progress("tokens and features", len(conversations)) as advance:
        for start in range(0, len(conversations), BATCH):
            part = conversations[start : start + BATCH]
            examples += tokeniser(part)
            if vision is not None:
                features.append(_features(vision, processor, [image for c in part for image in c.images]))
            advance(len(part))
    tensors = {
        "input_ids": torch.cat([e.input_ids for e in examples]).to(torch.int32),
        "labels": torch.cat([e.labels for e in examples]).to(torch.int32),
        "lengths": torch.tensor([len(e.input_ids) for e in examples]),
        "keys": torch.tensor([list(bytes.fromhex(e.key)) for e in examples], dtype=torch.uint8),
    }
    with whole_file(folder / INDEX) as part, IndexWriter(part) as index:
        for start in range(0, len(conversations), BATCH):
            rows = [as_row(conversation) for conversation in conversations[start : start + BATCH]]
            index.add(pa.Table.from_pylist(rows, schema=SCHEMA))
    about = {"conversations": sha256(folder / "train.parquet"), "index": sha256(folder / INDEX)}
    if vision is not None and features:
        tensors["features"] = torch.cat(features)
        about["tower"] = tower_hash(vision)
    with whole_file(folder / FILE) as part:
        # One key: safetensors writes several in any order, and equal data should make equal bytes.
        save_file(tensors, part, metadata={"about": json.dumps(about, sort_keys=True)})


@torch.inference_mode()
def prepare_features(files: Sequence[Path], processor, tower: Path, out: Path) -> None:
    """Write to `out` what the tower makes of every image in the `image` column of Parquet `files`, each once.

    In bf16, as a model that ships would compute it: keys uint8 [images, 32] (SHA-256 of the encoded image) and
    features bf16 [images, n, d].
    """
    vision = AutoModel.from_pretrained(tower, dtype=torch.bfloat16, local_files_only=True).eval()
    images = {}
    for file in files:
        for image in pq.read_table(file, columns=["image"])["image"].to_pylist():
            encoded = EncodedImage.from_bytes(str(image["path"]), image["bytes"])
            images[encoded.sha256] = encoded
    features, waiting = [], list(images.values())
    with progress("features of the benchmarks", len(waiting)) as advance:
        for start in range(0, len(waiting), BATCH):
            features.append(_features(vision, processor, waiting[start : start + BATCH]))
            advance(len(features[-1]))
    keys = torch.tensor([list(bytes.fromhex(key)) for key in images], dtype=torch.uint8)
    with whole_file(out) as part:
        save_file({"keys": keys, "features": torch.cat(features)}, part, metadata={"tower": tower_hash(vision)})


def load_features(path: Path, tower: nn.Module | None) -> dict[bytes, torch.Tensor]:
    """Features bf16 [n, d] by the SHA-256 of the image; empty where there is no file, or another tower made it."""
    if tower is None or not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        if file.metadata()["tower"] != tower_hash(tower):
            return {}
        keys, features = file.get_tensor("keys"), file.get_tensor("features")
    return {bytes(key): feature for key, feature in zip(keys.tolist(), features, strict=True)}


class _Numbered(Sequence[Example]):
    """Examples that are made one by one, when they are asked for; a slice makes none of them."""

    _one: Callable[[int], Example]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Chosen": ...
    def __getitem__(self, index: int | slice) -> "Example | Chosen":
        if isinstance(index, slice):
            return Chosen(self, np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._one(int(index) % len(self))


class Examples(_Numbered):
    """Examples of a data folder, made when they are asked for; the last ones are kept.

    Attributes:
        lengths: int64 [examples], tokens of each.
        captions: bool [examples].
    """

    def __init__(self, folder: Path, tower: nn.Module | None = None) -> None:
        """With features where they were made by `tower`'s weights; raises as `load_prepared`."""
        path = folder / FILE
        try:
            with safe_open(path, "pt") as file:  # tensors are memory-mapped and stay so
                about = json.loads(file.metadata()["about"])
                self.lengths: np.ndarray = file.get_tensor("lengths").numpy()
                self._ids, self._labels, self._keys = map(file.get_tensor, ("input_ids", "labels", "keys"))
                fits = tower is not None and about.get("tower") == tower_hash(tower)
                self._features = file.get_tensor("features") if fits else None
        except FileNotFoundError:
            raise GraceError(f"{path}: no such file; run `grace prepare` again") from None
        except Exception as error:  # safetensors raises its own kinds for a damaged file
            raise GraceError(
                f"{path}: cannot be read ({reason(error)}); delete the folder and run `grace prepare` again"
            ) from error
        for name, file in (("conversations", "train.parquet"), ("index", INDEX)):
            if not (folder / file).is_file():
                raise GraceError(f"{folder / file}: no such file; delete the folder and run `grace prepare` again")
            if about.get(name) != known_sha256(folder / file):
                raise GraceError(
                    f"{path}: was made from another {file}; delete the folder and run `grace prepare` again"
                )
        self._index = Index(folder)
        self.captions: np.ndarray = self._index.captions
        self._ends = np.cumsum(self.lengths)
        self._images = np.cumsum(self._index.counts, dtype=np.int64) if self._features is not None else None
        self._one = lru_cache(KEPT)(self._read)

    def __len__(self) -> int:
        return len(self.lengths)

    def _read(self, index: int) -> Example:
        end = int(self._ends[index])
        tokens = slice(end - int(self.lengths[index]), end)
        ids, labels = self._ids[tokens].long(), self._labels[tokens].long()
        key = self._keys[index].numpy().tobytes().hex()
        name, images = self._index.row(index)
        features = None
        if images and self._features is not None and self._images is not None:
            last = int(self._images[index])
            features = self._features[last - len(images) : last]
        return Example(name, key, ids, labels, bool(self.captions[index]), images, features)

    def block(self, start: int, end: int) -> "Block":
        """The examples from `start` to before `end`, of which there is one, laid end to end."""
        tokens = slice(int(self._ends[start] - self.lengths[start]), int(self._ends[end - 1]))
        ids, labels = self._ids[tokens].numpy(), self._labels[tokens].numpy()
        return Block(ids, labels, self.lengths[start:end], self._index.counts[start:end])

    def images_of(self, numbers: np.ndarray) -> np.ndarray:
        """int [numbers]: how many images each of these examples has."""
        return self._index.counts[numbers]

    def keys(self, start: int, end: int) -> list[str]:
        """The keys of the examples from `start` to before `end`."""
        return [bytes(key).hex() for key in self._keys[start:end].numpy()]


class Chosen(_Numbered):
    """Some of `examples`, by their numbers; some of some are again some of all."""

    def __init__(self, examples: Sequence[Example], numbers: np.ndarray) -> None:
        if isinstance(examples, Chosen):
            examples, numbers = examples.examples, examples.numbers[numbers]
        self.examples, self.numbers = examples, numbers
        self._one = lambda number: examples[int(numbers[number])]

    def __len__(self) -> int:
        return len(self.numbers)


class Block(NamedTuple):
    """Examples laid end to end.

    Attributes:
        input_ids, labels: int32 or int64 [tokens].
        lengths: int64 [examples], tokens of each.
        images: int [examples], images of each.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    images: np.ndarray


def blocks_of(examples: Sequence[Example]) -> Iterator[tuple[int, Block]]:
    """(number of the first, examples) of all of them, a bounded number at a time."""
    numbers = examples.numbers if isinstance(examples, Chosen) else np.arange(len(examples))
    whole = examples.examples if isinstance(examples, Chosen) else examples
    size = KEPT if isinstance(whole, Examples) else BATCH
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        if isinstance(whole, Examples) and part[-1] - part[0] == len(part) - 1 and (np.diff(part) == 1).all():
            yield start, whole.block(int(part[0]), int(part[-1]) + 1)
            continue
        some = [whole[int(number)] for number in part]
        ids, labels = (torch.cat([getattr(e, name) for e in some]).numpy() for name in ("input_ids", "labels"))
        lengths, images = (np.array([len(getattr(e, name)) for e in some]) for name in ("input_ids", "images"))
        yield start, Block(ids, labels, lengths, images)


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """int64 [examples]: tokens of each."""
    if isinstance(examples, Examples):
        return examples.lengths
    if isinstance(examples, Chosen):
        return lengths_of(examples.examples)[examples.numbers]
    return np.array([len(example.input_ids) for example in examples], np.int64)


def captions_of(examples: Sequence[Example]) -> np.ndarray:
    """bool [examples]: which only describe their images."""
    if isinstance(examples, Examples):
        return examples.captions
    return np.array([example.caption for example in examples], bool)


def keys_of(examples: Sequence[Example]) -> Iterator[str]:
    """The teacher records of those that are no captions."""
    if not isinstance(examples, Examples):
        yield from (example.key for example in examples if not example.caption)
        return
    for start in range(0, len(examples), KEPT):
        keys = examples.keys(start, min(start + KEPT, len(examples)))
        yield from (key for key, no in zip(keys, examples.captions[start : start + KEPT], strict=True) if not no)


def load_prepared(folder: Path, tower: nn.Module | None = None) -> Examples:
    """The examples of `folder`, with features where they were made by `tower`'s weights.

    Raises:
        GraceError: a file is missing, damaged, or was made from other conversations.
    """
    return Examples(folder, tower)
