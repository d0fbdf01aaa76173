"""The matrix shapes of a model's decoder, read from the headers of its safetensors files."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from grace.errors import GraceError, reason
from grace.families.base import LINEARS, READERS
from grace.quant.names import decoder_part

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
    order = [_short(part) for part in LINEARS]
    shapes = {f"model {'|'.join(sorted(names, key=order.index))}": size for size, names in named.items()}
    sizes = {name: size for size, names in named.items() for name in names}
    for linears in READERS.values():  # what decoding multiplies as one
        parts = [_short(linear) for linear in linears]
        if all(part in sizes for part in parts):
            shapes[f"model {'+'.join(parts)}"] = (sum(sizes[part][0] for part in parts), sizes[parts[0]][1])
    return shapes


def _short(linear: str) -> str:
    """`q` of `self_attn.q_proj`."""
    return linear.rpartition(".")[2].removesuffix("_proj")


def _linears(file: Path) -> list[tuple[str, tuple[int, int]]]:
    try:
        with safe_open(file, "pt") as tensors:
            found = []
            for key in tensors.keys():  # noqa: SIM118
                part = decoder_part(key.removesuffix("_shape"))
                if part is not None and part.part in LINEARS and part.kind == "weight":
                    packed = key.endswith("_shape")
                    shape = tensors.get_tensor(key).tolist() if packed else tensors.get_slice(key).get_shape()
                    found.append((_short(part.part), tuple(shape)))
            return found
    except SafetensorError as error:
        raise GraceError(f"{file}: not a whole safetensors file ({reason(error)}); copy or build it again") from error
