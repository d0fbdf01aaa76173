"""Reading a packed folder's codes and scales back: what the exporters start from."""

import operator
from dataclasses import dataclass
from pathlib import Path

import torch

from grace.errors import GraceError
from grace.families.files import read_config
from grace.precision import code_range
from grace.quant.bits import unpack_codes, words_per_row
from grace.quant.checkpoint import Checkpoint
from grace.quant.names import quantised_module

OUTSIDE = ("vision_tower", "multi_modal_projector", "visual")  # in the names of what is not the language model


@dataclass(frozen=True)
class PackedModel:
    """A compressed-tensors `pack-quantized` folder.

    Attributes:
        config: config.json.
        group_size: inputs per scale; -1 where an output has one.
        linears: {key of the dense weight, such as `...q_proj.weight`: module name in memory}.
        kept: keys of the tensors that are not quantised.
    """

    folder: Path
    config: dict
    bits: int
    group_size: int
    tensors: Checkpoint
    linears: dict[str, str]
    kept: list[str]

    @classmethod
    def open(cls, folder: Path) -> "PackedModel":
        """A `GraceError` says what `folder` is not."""
        tensors, config = Checkpoint.of_folder(folder), read_config(folder)
        settings = config.get("quantization_config") or {}
        if settings.get("format") != "pack-quantized":
            raise GraceError(
                f"{folder}: not a packed model (config.json has no pack-quantized quantization_config); pack it first"
            )
        try:
            weights = next(iter(settings["config_groups"].values()))["weights"]
            bits, group_size = operator.index(weights["num_bits"]), operator.index(weights.get("group_size") or -1)
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise GraceError(
                f"{folder / 'config.json'}: quantization_config has no config_groups with num_bits; pack the model "
                "again"
            ) from None
        code_range(bits)
        dense = [key.removesuffix("_packed") for key in tensors if key.endswith(".weight_packed")]
        linears = {key: module for key in dense if (module := quantised_module(key))}
        made = {f"{key}_{kind}" for key in linears for kind in ("packed", "scale", "shape")}
        kept = [key for key in tensors if key not in made]
        return cls(folder, config, bits, group_size, tensors, linears, kept)

    def unquantised(self) -> list[str]:
        """Decoder linears that stay in bf16, as the end of their name from `layers.` on, which all readers share."""
        modules = sorted(module for key in self.kept if (module := quantised_module(key)))
        return [module[module.rindex("layers.") :] for module in modules]

    def shape(self, key: str) -> tuple[int, int]:
        """[out, in] of a packed linear, checked against its packed tensors."""
        try:
            rows, columns = self.tensors[f"{key}_shape"].tolist()
        except (TypeError, ValueError):
            raise GraceError(f"{self.folder}: {key}_shape holds no two numbers; pack the model again") from None
        expected, steps = (rows, words_per_row(columns, self.bits)), self.tensors.spec(f"{key}_scale").shape
        if steps[1] * self.group_size != columns:
            raise GraceError(
                f"{self.folder / 'config.json'}: group_size {self.group_size} does not fit {key}, whose {columns} "
                f"inputs have {steps[1]} scales; set it to {columns // max(steps[1], 1)}, or pack the model again"
            )
        if self.tensors.spec(f"{key}_packed").shape != expected or steps[0] != rows:
            raise GraceError(
                f"{self.folder}: {key} does not have the shape that {self.bits} bits in groups of {self.group_size} "
                "give; correct config.json or pack it again"
            )
        return rows, columns

    def __getitem__(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 codes [out, in] and bf16 scales [out, groups] of one linear."""
        _, columns = self.shape(key)
        return unpack_codes(self.tensors[f"{key}_packed"], self.bits, columns), self.tensors[f"{key}_scale"]


def exact_fp16(scales: torch.Tensor, name: str) -> torch.Tensor:
    """bf16 scales as fp16; a `GraceError` names the layer where one is outside what fp16 can hold exactly."""
    half = scales.half()
    if not torch.equal(half.float(), scales.float()):
        worst = scales[half.float() != scales.float()][0].item()
        raise GraceError(
            f"{name}: the scale {worst:.3g} is not exact in fp16, which this format needs; deploy the packed folder "
            "instead"
        )
    return half
