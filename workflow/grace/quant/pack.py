"""From a quantised student to a folder that stock transformers, and vLLM, load: compressed-tensors `pack-quantized`.

Each quantised linear's `weight` becomes `weight_packed` int32 [out, in * bits / 32] (`grace.quant.bits`),
`weight_scale` bf16 [out, in / group_size] and `weight_shape` int64 [2]; every other tensor stays. Loading gives
`bf16(code * scale)`, so the packed model's logits are the student's own. Tensors are streamed one by one, and what was
written is read back and held against the student's codes, scales and weights, bit for bit.
"""

from pathlib import Path

import torch

from grace.errors import GraceError
from grace.families import family_of_folder
from grace.families.files import read_config
from grace.files import MANIFEST, contents_hash, read_json, whole_folder, write_json
from grace.progress import progress
from grace.quant.bits import pack_codes, unpack_codes, words_per_row
from grace.quant.card import ABOUT, about, write_card
from grace.quant.chat_template import write_bos
from grace.quant.checkpoint import SHARD_BYTES, Checkpoint, TensorSpec, copy_companions, copy_config, write_checkpoint
from grace.quant.grid import dequantize, group_count
from grace.quant.names import quantised_module
from grace.quant.student import StoredQuantization, read_quantization

# Linears that stay in bf16, by their names in memory: the head, the vision towers and projectors of every family.
# Without the vision entries, loading would look for packed weights there and fail.
IGNORED = [
    "lm_head",
    "re:.*lm_head",
    "re:.*vision_tower.*",
    "re:.*multi_modal_projector.*",
    "re:.*visual.*",
]
_ROWS = 64  # compared at once: they stay in the processor's cache


def quantization_config(bits: int, group_size: int, unquantised: list[str]) -> dict:
    """config.json's `quantization_config`; `unquantised` names decoder linears that stay in bf16."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [*IGNORED, *unquantised],
        "kv_cache_scheme": None,
    }


def _linears(model: Path, source: Checkpoint, stored: StoredQuantization) -> tuple[dict[str, str], list[str]]:
    """({key on disk: module} of the packed linears, modules of decoder linears that stay in bf16)."""
    linears = {key: module for key in source if (module := quantised_module(key))}
    missing = set(stored.layers) - set(linears.values())
    if missing:
        raise GraceError(
            f"{model}: quantization.json names {sorted(missing)[0]}, which the weights lack; build the student again"
        )
    packed = {key: module for key, module in linears.items() if module in set(stored.layers)}
    for key, module in packed.items():
        if source.spec(key).shape != stored.shape(module):
            raise GraceError(
                f"{model}: {key} is {list(source.spec(key).shape)}, but its codes are {list(stored.shape(module))}; "
                "build the student again"
            )
    return packed, sorted(set(linears.values()) - set(stored.layers))


def _same_weights(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> bool:
    """Whether bf16 `weight` is `bf16(codes * scales)`; a zero's sign, which a kernel may set, is no difference."""
    if weight.dtype != torch.bfloat16:
        return False
    for found, piece, steps in zip(*(t.split(_ROWS) for t in (weight, codes, scales)), strict=True):
        expected = dequantize(piece, steps)
        if not torch.equal(found.view(torch.int16), expected.view(torch.int16)) and not torch.equal(found, expected):
            return False
    return True


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def verify(model: Path, packed: Path) -> None:
    """Hold a packed folder against its student: codes and scales bit for bit, weights, and every other tensor.

    Raises:
        GraceError: the first tensor that differs.
    """
    source, written, stored = Checkpoint.of_folder(model), Checkpoint.of_folder(packed), read_quantization(model)
    linears, _ = _linears(model, source, stored)
    family = family_of_folder(model)
    with progress("verifying", len(source)) as advance:
        for key in source:
            advance(note=key)
            if key not in linears:
                name = family.published(key)
                same = name in written and source.spec(key)._replace(name=name) == written.spec(name)
                if not (same and torch.equal(_bytes(source[key]), _bytes(written[name]))):
                    raise GraceError(f"{packed}: {key} differs from {model}; pack it again")
                continue
            codes, scales = stored[linears[key]]
            if not _same_weights(source[key], codes, scales):
                raise GraceError(
                    f"{model}: {key} is not bf16(codes * scales) of {linears[key]}; build the student again"
                )
            read = unpack_codes(written[f"{key}_packed"], stored.bits, codes.shape[1])
            if not (
                torch.equal(read, codes)
                and torch.equal(written[f"{key}_scale"].view(torch.int16), scales.view(torch.int16))
                and written[f"{key}_shape"].tolist() == list(codes.shape)
            ):
                raise GraceError(f"{packed}: {key}_packed differs from the student's codes or scales; pack it again")


def pack_student(model: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> StoredQuantization:
    """Write the packed weights and config of student `model` into the existing `folder`, and verify them."""
    source, stored = Checkpoint.of_folder(model), read_quantization(model)
    linears, unquantised = _linears(model, source, stored)
    specs, kept, origin = [], {}, {}
    family = family_of_folder(model)
    for key in source:
        if key not in linears:
            name = family.published(key)
            specs.append(source.spec(key)._replace(name=name))
            kept[name] = key
            continue
        rows, columns = source.spec(key).shape
        groups = group_count(columns, stored.group_size, linears[key])
        specs.append(TensorSpec(f"{key}_packed", torch.int32, (rows, words_per_row(columns, stored.bits))))
        specs.append(TensorSpec(f"{key}_scale", torch.bfloat16, (rows, groups)))
        specs.append(TensorSpec(f"{key}_shape", torch.int64, (2,)))
        origin |= {f"{key}_{kind}": key for kind in ("packed", "scale", "shape")}

    def produce(name: str) -> torch.Tensor:
        advance(note=name)
        if name in kept:
            return source[kept[name]]
        codes, scales = stored[linears[origin[name]]]
        if name.endswith("_scale"):
            return scales
        return torch.tensor(codes.shape) if name.endswith("_shape") else pack_codes(codes, stored.bits)

    with progress("packing", len(specs)) as advance:
        write_checkpoint(folder, specs, produce, shard_bytes)
    settings = quantization_config(stored.bits, stored.group_size, unquantised)
    copy_config(model, folder, dtype="bfloat16", quantization_config=settings)
    verify(model, folder)
    return stored


def pack(model: Path, out: Path) -> None:
    """`grace pack`: write, verify and describe the packed form of a quantised student.

    Args:
        model: the student's folder (`quantization.safetensors` beside the checkpoint).
        out: the packed folder to make.

    Raises:
        GraceError: `model` is no quantised student, is damaged, or does not match its own codes.
    """
    manifest = read_json(model / MANIFEST) if (model / MANIFEST).is_file() else {}
    source = contents_hash(model / MANIFEST) if manifest else None
    with whole_folder(out, source=source, format="pack-quantized") as folder:
        stored = pack_student(model, folder)
        copy_companions(model, folder)
        write_bos(folder)
        write_json(folder / ABOUT, about(stored, read_config(folder), manifest, source))
        write_card(folder)
