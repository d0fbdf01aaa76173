"""Checkpoint folders tensor by tensor: read through the memory map, written as a stream in bounded memory.

safetensors' own writer wants a whole file's tensors at once. The format is simple enough to stream: eight bytes of
header length, a JSON header with every tensor's dtype, shape and byte range, then the bytes. All shapes are known
before the first tensor is made, so the header comes first and one tensor is held at a time.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from grace.errors import GraceError, reason
from grace.families.files import INDEX, read_config, read_weight_map
from grace.files import ENVIRONMENT, MANIFEST, TIMING, read_json, whole_file, write_json

SHARD_BYTES = 4_000_000_000
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """What a file's header says of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "TensorSpec":
        return cls(name, tensor.dtype, tuple(tensor.shape))


def _open(path: Path):
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise GraceError(f"{path}: no such file; build or copy the model again") from None
    except (SafetensorError, OSError) as error:
        raise GraceError(f"{path}: truncated or damaged ({reason(error)}); build or copy the model again") from None


class Checkpoint:
    """The tensors of one safetensors file, or of all files that `model.safetensors.index.json` lists.

    Raises:
        GraceError: a file is missing, truncated or damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = {name: file for file in map(_open, files) for name in file.keys()}  # noqa: SIM118 (not a mapping)

    @classmethod
    def of_folder(cls, folder: Path) -> "Checkpoint":
        """The weights of a model folder; a `GraceError` says so where it is none."""
        if not (folder / "config.json").is_file():
            raise GraceError(f"{folder}: not a model folder (config.json is missing); give the folder of a checkpoint")
        names = {"model.safetensors"}
        if (folder / INDEX).is_file():
            names = set((read_weight_map(folder) or {}).values())
        return cls([folder / name for name in sorted(names)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape, without reading the tensor."""
        entry = self._file(name).get_slice(name)
        if entry.get_dtype() not in DTYPES:
            raise GraceError(f"{name}: is stored as {entry.get_dtype()}, which is not supported; convert it to bf16")
        return TensorSpec(name, DTYPES[entry.get_dtype()], tuple(entry.get_shape()))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file(name).get_tensor(name)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise GraceError(
                f"the weights have no tensor {name}, which config.json asks for; build or copy the model again"
            )
        return self._files[name]


def write_tensors(path: Path, specs: Sequence[TensorSpec], produce: Callable[[str], torch.Tensor]) -> None:
    """Write a safetensors file, asking `produce(name)` for each tensor when its turn comes.

    Tensors lie by falling element size, so that each is aligned; among equals in the order given.
    """
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        begin, end = end, end + spec.bytes
        header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Under another name first: the old file may still be mapped, as the source of the new one.
    with whole_file(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in ordered:
            tensor = produce(spec.name)
            if TensorSpec.of(spec.name, tensor) != spec:
                raise ValueError(f"{spec.name}: planned {spec}, made {tensor.dtype} {tuple(tensor.shape)}")
            if spec.bytes:
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_checkpoint(
    folder: Path, specs: Sequence[TensorSpec], produce: Callable[[str], torch.Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model's weights as transformers names them: one file, or shards of at most `shard_bytes` and an index."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.bytes
    if len(shards) == 1:
        return write_tensors(folder / "model.safetensors", specs, produce)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard, produce)
        weight_map |= {spec.name: name for spec in shard}
    total = sum(spec.bytes for spec in specs)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def rename_weights(folder: Path, renamed: Callable[[str], str]) -> None:
    """Give the weights of a model folder other names, file by file; files whose names stay are not touched."""
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
    for path in sorted(folder.glob("*.safetensors")):
        held = Checkpoint([path])
        origin = {renamed(name): name for name in held}
        if list(origin) != list(held):
            specs = [held.spec(name)._replace(name=new) for new, name in origin.items()]
            write_tensors(path, specs, lambda name, held=held, origin=origin: held[origin[name]])
    if index is not None:
        index["weight_map"] = {renamed(name): file for name, file in index["weight_map"].items()}
        write_json(folder / INDEX, index)


def plain_config(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config without the path that its model was read from; `dtype`, unless None, in its parts too."""
    plain = {key: value for key, value in config.items() if key not in ("_name_or_path", "torch_dtype", "dtype")}
    for part in ("text_config", "vision_config"):
        if isinstance(plain.get(part), dict):
            plain[part] = plain_config(plain[part], dtype)
    named = dtype or config.get("dtype") or config.get("torch_dtype")
    return {"dtype": named, **plain} if named else plain


def copy_config(source: Path, target: Path, dtype: str | None = None, **changes: Any) -> None:
    """Copy a model's config.json with some keys replaced,
    the dtype under its present name and the same in all parts.
    """
    config = plain_config(read_config(source), dtype)
    write_json(target / "config.json", {**config, **changes})


def name_as_published(folder: Path, renamed: Callable[[str], str], dtype: str = "bfloat16") -> None:
    """Make what transformers saved a folder that every reader takes: published names, one dtype, no paths.

    Args:
        folder: of a model, just saved.
        renamed: from transformers' names to those of published checkpoints (`Family.published`).
        dtype: of its weights.
    """
    rename_weights(folder, renamed)
    copy_config(folder, folder, dtype)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what stands beside the weights: processor, tokenizer, chat template, generation config.

    Left behind: weights, config.json, quantization files, manifest and model card, which the target gets of its own.
    """
    own = {"config.json", INDEX, "quantization.json", MANIFEST, ENVIRONMENT, TIMING, "README.md"}
    weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in weights and path.name not in own:
            shutil.copyfile(path, target / path.name)
