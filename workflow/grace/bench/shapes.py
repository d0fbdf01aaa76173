"""The matrix shapes of a model's decoder, read from the headers of its safetensors files."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from grace.errors import GraceError, reason
from grace.infer.fuse import GROUPS

_DECODER = re.compile(
    r"(?:^|\.)(?:language_model|model)\.layers\.\d+\.(?:self_attn|mlp)\.([a-z]+)_proj\.(weight|weight_shape)$"
)
_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")
FIELD_SHAPES = {"llava-1.5-7b gate|up": (11008, 4096)}  # the largest single linear of the paper's model


def decoder_shapes(folder: str | Path) -> dict[str, tuple[int, int]]:
    """`{"model q|k|v|o": (out, in), ..., "model q+k+v": (3 out, in)}`: different shapes once, then joined linears.

    Reads plain and packed folders; headers and `weight_shape`s alone, so a 7B model takes milliseconds.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise GraceError(f"{folder}: has no *.safetensors; give the folder of a checkpoint")
    named: dict[tuple[int, int], list[str]] = {}
    for file in files:
        for name, shape in _linears(file):
            if name not in named.setdefault(shape, []):
                named[shape].append(name)
    if not named:
        raise GraceError(
            f"{folder}: no decoder linears (self_attn and mlp projections) found; is it a Llama-type model?"
        )
    order = ["q", "k", "v", "o", "gate", "up", "down"]
    shapes = {f"model {'|'.join(sorted(names, key=order.index))}": size for size, names in named.items()}
    sizes = {name: size for size, names in named.items() for name in names}
    for names in GROUPS.values():  # what decoding multiplies as one
        parts = [name.removesuffix("_proj") for name in names]
        if all(part in sizes for part in parts):
            shapes[f"model {'+'.join(parts)}"] = (sum(sizes[part][0] for part in parts), sizes[parts[0]][1])
    return shapes


def _linears(file: Path) -> list[tuple[str, tuple[int, int]]]:
    try:
        with safe_open(file, "pt") as tensors:
            found = [(_DECODER.search(key), key) for key in tensors.keys() if not _VISION.search(key)]  # noqa: SIM118
            return [
                (
                    hit[1],
                    tuple(
                        tensors.get_slice(key).get_shape() if hit[2] == "weight" else tensors.get_tensor(key).tolist()
                    ),
                )
                for hit, key in found
                if hit
            ]
    except SafetensorError as error:
        raise GraceError(f"{file}: not a whole safetensors file ({reason(error)}); copy or build it again") from error
