"""How a quantised student is kept: codes and scales beside the dequantised checkpoint.

`quantization.safetensors` holds `{linear}.codes` int8 [out, in] and `{linear}.scales` bf16 [out, in / group_size];
`quantization.json` holds bits, group_size, method and the linears' names (as modules in memory). The folder's
model.safetensors holds `bf16(codes * scales)`, so it runs anywhere as an ordinary model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from grace.errors import GraceError, problem
from grace.files import read_json, write_json
from grace.precision import code_range
from grace.quant.checkpoint import Checkpoint, TensorSpec, write_tensors
from grace.quant.grid import group_count

TENSORS = "quantization.safetensors"
DESCRIPTION = "quantization.json"


class _Description(BaseModel):
    """`quantization.json`."""

    model_config = ConfigDict(strict=True)

    bits: int
    group_size: int
    method: str
    layers: list[str]


def write_quantization(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    produce: Callable[[str, str], torch.Tensor],
    bits: int,
    group_size: int,
    method: str,
) -> None:
    """Stream what `produce(name, "codes")` and `produce(name, "scales")` give into `folder`.

    `shapes` are the linears' [out, in] by module name; the files are those of `save_quantization`.
    """
    specs = []
    for name, (rows, columns) in shapes.items():
        specs.append(TensorSpec(f"{name}.codes", torch.int8, (rows, columns)))
        specs.append(TensorSpec(f"{name}.scales", torch.bfloat16, (rows, group_count(columns, group_size, name))))

    write_tensors(folder / TENSORS, specs, lambda key: produce(*key.rsplit(".", 1)))
    about = {"bits": bits, "group_size": group_size, "method": method, "layers": list(shapes)}
    write_json(folder / DESCRIPTION, about)


def save_quantization(
    folder: str | Path,
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    bits: int,
    group_size: int,
    method: str,
) -> None:
    """Keep codes and scales beside a checkpoint.

    Args:
        folder: the student's model folder; it gets quantization.safetensors and quantization.json.
        layers: module name -> (int8 codes [out, in], bf16 scales [out, in / group_size]).
        method: "lsq", "rtn", "awq" or "gptq".
    """
    shapes = {name: tuple(codes.shape) for name, (codes, _) in layers.items()}
    write_quantization(
        Path(folder), shapes, lambda name, kind: layers[name][kind == "scales"], bits, group_size, method
    )


@dataclass(frozen=True)
class StoredQuantization:
    """What `save_quantization` kept; codes and scales are read, and checked, one layer at a time."""

    folder: Path
    bits: int
    group_size: int
    method: str
    layers: list[str]
    tensors: Checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one linear's codes; a `GraceError` where codes or scales are missing."""
        for kind in ("codes", "scales"):
            if f"{name}.{kind}" not in self.tensors:
                raise GraceError(f"{self.folder / TENSORS}: lacks {name}.{kind}; build the student again")
        return self.tensors.spec(f"{name}.codes").shape

    def __getitem__(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(int8 codes [out, in], bf16 scales [out, groups]) of one linear.

        Raises:
            GraceError: they are missing, of another shape or dtype, out of range or not finite.
        """
        path = self.folder / TENSORS
        self.shape(name)
        codes, scales = self.tensors[f"{name}.codes"], self.tensors[f"{name}.scales"]
        if codes.dtype != torch.int8 or codes.ndim != 2 or scales.dtype != torch.bfloat16:
            raise GraceError(f"{path}: {name} is not int8 codes [out, in] with bf16 scales; build the student again")
        groups = group_count(codes.shape[1], self.group_size, name)
        if tuple(scales.shape) != (codes.shape[0], groups):
            raise GraceError(
                f"{path}: {name}.scales is {list(scales.shape)}, but {list(codes.shape)} codes in groups of "
                f"{self.group_size} need {[codes.shape[0], groups]}; correct group_size in {DESCRIPTION}"
            )
        lowest, highest = code_range(self.bits)
        least, most = codes.aminmax()
        if least < lowest or most > highest:
            raise GraceError(
                f"{path}: {name}.codes runs from {least} to {most}, outside [{lowest}, {highest}] of {self.bits} bits; "
                f"correct bits in {DESCRIPTION} or build the student again"
            )
        if not (torch.isfinite(scales).all() and (scales > 0).all()):
            raise GraceError(
                f"{path}: {name}.scales has a scale that is not positive and finite; build the student again"
            )
        return codes, scales


def read_quantization(folder: str | Path) -> StoredQuantization:
    """Open a student folder's codes and scales.

    Raises:
        GraceError: the folder has none, or the description is incomplete, or the tensors are damaged.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise GraceError(f"{folder}: not a quantised student ({DESCRIPTION} is missing); quantise it first")
    try:
        about = _Description.model_validate(read_json(folder / DESCRIPTION))
    except ValidationError as error:
        raise GraceError(f"{folder / DESCRIPTION}: {problem(error)}; build it again") from None
    code_range(about.bits)
    return StoredQuantization(folder, **about.model_dump(), tensors=Checkpoint([folder / TENSORS]))
