"""What every training job would otherwise compute again: token ids, labels and the frozen tower's features.

The tower is frozen, so its output for an image is the same in every step of every run. For the demo's 9 visual
tokens it is 2 KB per image and kept; for LLaVA-1.5's 576 it would be 1.2 MB, so data sets of real size keep token
ids alone and run the tower.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

from grace.data.conversations import load_conversations, load_images
from grace.data.examples import Example, Tokeniser
from grace.data.images import EncodedImage
from grace.errors import GraceError
from grace.files import sha256, whole_file
from grace.progress import progress

FILE = "examples.safetensors"
BATCH = 256


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
    """Write `folder/examples.safetensors` from `folder/train.parquet`; with a tower, its features too."""
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
    about = {"conversations": sha256(folder / "train.parquet")}
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


def load_prepared(folder: Path, tower: nn.Module | None = None) -> list[Example]:
    """The examples of `folder`, with features where they were made by `tower`'s weights.

    Raises:
        GraceError: the file is missing, damaged, or was made from other conversations.
    """
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != "features"}  # noqa: SIM118
            fits = tower is not None and about.get("tower") == tower_hash(tower)
            features = file.get_tensor("features") if fits else None
    except FileNotFoundError:
        raise GraceError(f"{path}: no such file; run `grace prepare` again") from None
    except Exception as error:  # safetensors raises its own kinds for a damaged file
        raise GraceError(
            f"{path}: cannot be read ({error}); delete the folder and run `grace prepare` again"
        ) from error
    if about["conversations"] != sha256(folder / "train.parquet"):
        raise GraceError(
            f"{path}: was made from another train.parquet; delete the folder and run `grace prepare` again"
        )
    lengths = tensors["lengths"].tolist()
    ids, labels = (tensors[name].long().split(lengths) for name in ("input_ids", "labels"))
    keys = [bytes(key).hex() for key in tensors["keys"].numpy()]
    rows = load_images(folder / "train.parquet")
    counts = [len(images) for _, images, _ in rows]
    seen = features.split(counts) if features is not None else [None] * len(rows)
    return [
        Example(name, key, own_ids, own_labels, caption, images, feature)
        for (name, images, caption), key, own_ids, own_labels, feature in zip(
            rows, keys, ids, labels, seen, strict=True
        )
    ]
