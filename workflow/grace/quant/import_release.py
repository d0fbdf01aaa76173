"""The authors' released checkpoints as a packed folder of ours: the codes as they are, and checked one by one.

Two of their formats hold codes. An AWQ folder holds them packed (`awq_gemm`), with fp16 scales and a list of its
modules in `awq_quantized_modules.json`. A dense folder holds `bf16(code * scale)`, and beside it
`qat_quantized_weights.bin` the same weights with `log_scale`, the logarithm of every group's scale:
`[out * in / group]`, row by row, bf16 or fp32; its codes are `round(weight / exp(log_scale))`, and each must give its
weight again, bit for bit. The packed folder of a dense one has fp32 scales, so that it is the same function as the
dense weights; that of an AWQ folder has its fp16 scales. The two differ by up to 0.4% in a weight: a table says which
of them it evaluated by the `imported` in the manifest.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grace.config.pretrained import SIDECAR
from grace.errors import GraceError, reason
from grace.families import family_of_folder
from grace.families.files import read_config
from grace.files import MANIFEST, read_json, sha256, whole_folder, write_json
from grace.precision import code_range
from grace.progress import progress
from grace.quant.awq_gemm import unpack_gemm
from grace.quant.bits import pack_codes, unpack_codes, words_per_row
from grace.quant.card import ABOUT, write_card
from grace.quant.checkpoint import Checkpoint, TensorSpec, copy_companions, plain_config, write_checkpoint
from grace.quant.names import quantised_module
from grace.quant.pack import quantization_config

MODULES = "awq_quantized_modules.json"
ZERO_POINTS = -2004318072  # 0x88888888: eight zero points of 8
OWN = ("qat", "awq_packing")  # parts of config.json that mean nothing here


@dataclass(frozen=True)
class Released:
    """A released checkpoint's codes.

    Attributes:
        linears: {name on disk, such as `model.language_model.layers.0.mlp.up_proj`: [out, in]}.
        replaced: keys of the checkpoint in whose place the codes come.
        scales: dtype that the format's function has them in.
        read: a linear's int8 codes [out, in] and scales [out, in / group].
        imported: what the packed folder computes, in words.
    """

    bits: int
    group_size: int
    linears: dict[str, tuple[int, int]]
    replaced: frozenset[str]
    scales: torch.dtype
    read: Callable[[str], tuple[torch.Tensor, torch.Tensor]]
    imported: str


def import_release(folder: Path, out: Path) -> None:
    """`grace import`: write a released checkpoint's packed folder and hold it against the checkpoint, code by code.

    Raises:
        GraceError: no released checkpoint with codes, another layout than transformers', a scale that is zero or not
            finite, a weight that is no code times its scale, or a layer that is listed and not there.
    """
    config, tensors = read_config(folder), Checkpoint.of_folder(folder)
    family = family_of_folder(folder)
    released = _awq(folder, tensors) if (folder / MODULES).is_file() else _sidecar(folder, config, tensors)
    kept = {family.published(key): key for key in tensors if key not in released.replaced}
    specs = [tensors.spec(key)._replace(name=name) for name, key in kept.items()]
    origin: dict[str, str] = {}
    for name, (rows, columns) in released.linears.items():
        groups, key = columns // released.group_size, f"{name}.weight"
        specs += [
            TensorSpec(f"{key}_packed", torch.int32, (rows, words_per_row(columns, released.bits))),
            TensorSpec(f"{key}_scale", released.scales, (rows, groups)),
            TensorSpec(f"{key}_shape", torch.int64, (2,)),
        ]
        origin |= {f"{key}_{kind}": name for kind in ("packed", "scale", "shape")}
    unquantised = sorted(module for key in kept.values() if (module := quantised_module(key)))

    def produce(name: str) -> torch.Tensor:
        advance(note=name)
        if name in kept:
            return tensors[kept[name]]
        if name.endswith("_shape"):
            return torch.tensor(released.linears[origin[name]])
        codes, scales = released.read(origin[name])
        return scales if name.endswith("_scale") else pack_codes(codes, released.bits)

    with whole_folder(out, imported=released.imported, format="pack-quantized") as part:
        with progress("importing", len(specs)) as advance:
            write_checkpoint(part, specs, produce)
        settings = quantization_config(released.bits, released.group_size, unquantised)
        copy_companions(folder, part)
        (part / MODULES).unlink(missing_ok=True)
        plain = {key: value for key, value in plain_config(config, None).items() if key not in OWN}
        write_json(part / "config.json", {**plain, "quantization_config": settings})
        write_json(part / ABOUT, _about(folder, config, released))
        write_card(part)
        _verify(released, Checkpoint.of_folder(part), out)


def _about(folder: Path, config: dict[str, Any], released: Released) -> dict[str, Any]:
    """What `card.json` keeps of a release: `grace.quant.card.about` for codes that no student of ours holds."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    sources = sorted([*folder.glob("*.safetensors"), *folder.glob(SIDECAR)])
    return {
        "architecture": config["architectures"][0],
        "bits": released.bits,
        "group_size": released.group_size,
        "method": "release",
        "linears": len(released.linears),
        "recipe": {
            "imported": released.imported,
            **{key: manifest[key] for key in ("pretrained", "revision") if manifest.get(key)},
        },
        "hashes": {path.name: sha256(path) for path in sources},
    }


def _verify(released: Released, written: Checkpoint, out: Path) -> None:
    """Hold every code and scale that was written against the released ones."""
    for name, (_, columns) in released.linears.items():
        codes, scales = released.read(name)
        read = unpack_codes(written[f"{name}.weight_packed"], released.bits, columns)
        if not (torch.equal(read, codes) and torch.equal(written[f"{name}.weight_scale"], scales)):
            raise GraceError(f"{out}: {name} differs from the released codes or scales; import it again")


def _awq(folder: Path, tensors: Checkpoint) -> Released:
    about = read_json(folder / MODULES)
    names, group, bits = about["modules"], about["group_size"], about["bits"]
    if bits != 4:
        raise GraceError(f"{folder / MODULES}: says {bits} bits, and AWQ's GEMM layout holds 4; fetch it again")
    lacking = [f"{n}.{kind}" for n in names for kind in ("qweight", "qzeros", "scales") if f"{n}.{kind}" not in tensors]
    unlisted = {key for key in tensors if key.endswith(".qweight")} - {f"{name}.qweight" for name in names}
    if lacking or unlisted:
        raise GraceError(
            f"{folder}: {MODULES} and the weights differ in {(lacking or sorted(unlisted))[0]}; fetch it again"
        )
    _check_names(folder, names)
    linears = {}
    for name in names:
        columns, words = tensors.spec(f"{name}.qweight").shape
        linears[name] = (words * 8, columns)
        if columns % group or tensors.spec(f"{name}.scales").shape != (columns // group, words * 8):
            raise GraceError(f"{folder}: {name} has no scales for groups of {group}; fetch it again")

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if not bool((tensors[f"{name}.qzeros"] == ZERO_POINTS).all()):
            raise GraceError(
                f"{folder}: {name} has other zero points than 8, which are no symmetric codes; fetch it again"
            )
        scales = tensors[f"{name}.scales"].T.contiguous()
        _check_scales(folder, name, scales)
        return unpack_gemm(tensors[f"{name}.qweight"]), scales

    replaced = frozenset(f"{name}.{kind}" for name in names for kind in ("qweight", "qzeros", "scales"))
    return Released(4, group, linears, replaced, torch.float16, read, "the AWQ folder: codes times fp16 scales")


def _sidecar(folder: Path, config: dict[str, Any], tensors: Checkpoint) -> Released:
    if not (folder / SIDECAR).is_file():
        raise GraceError(
            f"{folder}: has neither {MODULES} nor {SIDECAR}, without which codes and scales are not known; fetch the "
            "whole repository, or the AWQ one"
        )
    if any(key.endswith(".log_scale") for key in tensors):
        raise GraceError(
            f"{folder}: a checkpoint of a training that is not finished (log_scale in its weights); fetch a release"
        )
    try:
        bits, group = config["qat"]["bits"], config["qat"]["group_size"]
    except (KeyError, TypeError):
        raise GraceError(f"{folder / 'config.json'}: has no `qat` with bits and group_size; fetch it again") from None
    try:
        held = torch.load(folder / SIDECAR, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a zip that is cut short, or a pickle that asks for more than tensors
        raise GraceError(f"{folder / SIDECAR}: holds no plain tensors ({reason(error)}); fetch it again") from error
    names = [key.removesuffix(".log_scale") for key in held if key.endswith(".log_scale")]
    low, high = code_range(bits)
    if not names:
        raise GraceError(f"{folder / SIDECAR}: holds no log_scale; fetch it again")
    _check_names(folder, names)
    linears = {}
    for name in names:
        key = f"{name}.weight"
        if key not in tensors or key not in held:
            raise GraceError(f"{folder}: {key} is not in both the weights and {SIDECAR}; fetch it again")
        rows, columns = tensors.spec(key).shape
        if columns % group or held[f"{name}.log_scale"].numel() != rows * columns // group:
            raise GraceError(
                f"{folder}: {name} has no scales for groups of {group}, which packing needs; leave it dense"
            )
        linears[name] = (rows, columns)

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight, (rows, columns) = tensors[f"{name}.weight"], linears[name]
        if not torch.equal(held[f"{name}.weight"].to(weight.dtype), weight):
            raise GraceError(f"{folder}: {name} differs between the weights and {SIDECAR}; fetch both again")
        scales = held[f"{name}.log_scale"].float().exp().view(rows, columns // group)
        _check_scales(folder, name, scales)
        steps = scales.repeat_interleave(group, 1)
        codes = (weight.float() / steps).round().clamp(low, high)
        wrong = int(((codes * steps).to(weight.dtype) != weight).sum())
        if wrong:
            raise GraceError(
                f"{folder}: {wrong} weights of {name} are no code times their scale; fetch a finished release"
            )
        return codes.to(torch.int8), scales

    replaced = frozenset(f"{name}.weight" for name in names)
    told = f"the dense folder: {bits}-bit codes times fp32 scales, rounded to its dtype"
    return Released(bits, group, linears, replaced, torch.float32, read, told)


def _check_names(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if quantised_module(f"{name}.weight") is None:
            raise GraceError(f"{folder}: quantises {name}, which is no linear of the decoder; deploy it as released")


def _check_scales(folder: Path, name: str, scales: torch.Tensor) -> None:
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise GraceError(f"{folder}: {name} has a scale that is zero, negative or not finite; fetch it again")
