"""The packed decoder as a GGUF file with Q4_0 linears, for llama.cpp and what reads its files.

A Q4_0 block is 32 weights of a row: their scale in fp16, then sixteen bytes; byte j holds weight j in the low and
weight j + 16 in the high half, each as code + 8. A group of 64 or 128 repeats its scale. The other matrices are bf16,
vectors fp32. The file holds the language model and its tokenizer; `gguf_vision` writes the tower's.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    dequantize,
    get_tensor_name_map,
)

from grace.errors import GraceError
from grace.progress import progress
from grace.quant.gguf_vocabulary import Vocabulary
from grace.quant.packed import OUTSIDE, PackedModel, exact_fp16

BLOCK, BLOCK_BYTES = 32, 18
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2_vl_text": MODEL_ARCH.QWEN2VL,
    "qwen2_5_vl_text": MODEL_ARCH.QWEN2VL,
    "qwen3_vl_text": MODEL_ARCH.QWEN3VL,
}


def q4_0(codes: torch.Tensor, scales: torch.Tensor, name: str = "weight") -> np.ndarray:
    """Blocks uint8 [out, in / 32 * 18] of int8 codes [out, in] in [-8, 7] and bf16 scales [out, groups]."""
    rows, columns = codes.shape
    step = exact_fp16(scales, name).repeat_interleave(columns // BLOCK // scales.shape[1], 1)
    halves = (codes.view(rows, -1, 2, BLOCK // 2) + 8).view(torch.uint8)
    nibbles = halves[:, :, 0] | halves[:, :, 1] << 4
    return torch.cat([step.contiguous().view(torch.uint8).view(rows, -1, 2), nibbles], 2).flatten(1).numpy()


def rotary_order(rows: int, heads: int) -> torch.Tensor:
    """Where each row of a Llama q or k goes: GGUF pairs neighbours for the rotation, transformers pairs halves."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def _describe(writer: GGUFWriter, text: dict, arch: MODEL_ARCH) -> None:
    heads = text["num_attention_heads"]
    width = text.get("head_dim") or text["hidden_size"] // heads
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta") or text.get("rope_theta") or 10000.0)
    writer.add_vocab_size(text["vocab_size"])
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    if arch is MODEL_ARCH.LLAMA:
        writer.add_rope_dimension_count(width)
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])


def _plain_name(key: str) -> str | None:
    """A text tensor's name as a plain causal language model has it; None for the vision side."""
    if any(part in key for part in OUTSIDE):
        return None
    for prefix in ("language_model.model.", "model.language_model.", "language_model.", "model."):
        key = key.removeprefix(prefix)
    return key if key.startswith("lm_head") else f"model.{key}"


class _Entry(NamedTuple):
    """A tensor of the file: its key in the packed folder, and the heads whose rows are put in the rotation's order."""

    key: str
    heads: int | None


def _plan(model: PackedModel, text: dict, arch: MODEL_ARCH) -> dict[str, _Entry]:
    """{name in the file: what it is made of}."""
    names = get_tensor_name_map(arch, text["num_hidden_layers"])
    heads = text["num_attention_heads"]
    turned = {"q_proj": heads, "k_proj": text.get("num_key_value_heads") or heads} if arch is MODEL_ARCH.LLAMA else {}
    plan = {}
    for key in [*model.linears, *model.kept]:
        plain = _plain_name(key)
        if plain is not None:
            module, _, kind = plain.rpartition(".")
            plan[f"{names.get_name(module)}.{kind}"] = _Entry(key, turned.get(module.rpartition(".")[2]))
    return plan


def _linear(model: PackedModel, entry: _Entry) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = model[entry.key]
    if entry.heads:
        order = rotary_order(len(codes), entry.heads)
        codes, scales = codes[order], scales[order]
    return codes, scales


def _data(model: PackedModel, entry: _Entry) -> np.ndarray:
    """A tensor as it lies in the file: blocks or bf16 as bytes uint8 [rows, bytes], vectors fp32."""
    if entry.key in model.linears:
        return q4_0(*_linear(model, entry), entry.key)
    tensor = model.tensors[entry.key]
    if entry.heads:
        tensor = tensor[rotary_order(len(tensor), entry.heads)]
    return tensor.bfloat16().view(torch.uint8).numpy() if tensor.ndim > 1 else tensor.float().numpy()


def _add_info(writer: GGUFWriter, model: PackedModel, name: str, entry: _Entry) -> None:
    if entry.key in model.linears:
        rows, columns = model.shape(entry.key)
        width, kind = columns // BLOCK * BLOCK_BYTES, GGMLQuantizationType.Q4_0
        writer.add_tensor_info(name, (rows, width), np.dtype(np.uint8), rows * width, kind)
        return
    shape: tuple[int, ...] = model.tensors.spec(entry.key).shape
    rows = shape[0]
    if len(shape) > 1:
        width = 2 * shape[1]
        writer.add_tensor_info(name, (rows, width), np.dtype(np.uint8), rows * width, GGMLQuantizationType.BF16)
    else:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * rows)


def _verify(model: PackedModel, plan: dict[str, _Entry], path: Path) -> None:
    """Read the file back with the gguf package and hold every linear against `code * scale` in fp32, exactly."""
    for tensor in GGUFReader(path).tensors:
        entry = plan[tensor.name]
        if entry.key in model.linears:
            codes, scales = _linear(model, entry)
            expected = codes.float().unflatten(1, (scales.shape[1], -1)) * scales.float()[..., None]
            if not np.array_equal(dequantize(tensor.data, tensor.tensor_type), expected.flatten(1).numpy()):
                raise GraceError(f"{path}: {tensor.name} reads back with other codes or scales; export it again")


def check(model: PackedModel) -> MODEL_ARCH:
    """The architecture that the file will name; a `GraceError` where Q4_0 or llama.cpp cannot hold the decoder."""
    text = model.config.get("text_config", model.config)
    if model.bits != 4:
        raise GraceError(f"{model.folder}: holds {model.bits}-bit codes, but Q4_0 holds 4 bits; export gptq instead")
    if model.group_size % BLOCK:
        raise GraceError(
            f"{model.folder}: groups of {model.group_size} cannot be cut into Q4_0's blocks of {BLOCK}; use a multiple"
        )
    if text["model_type"] not in ARCHITECTURES:
        raise GraceError(
            f"{model.folder}: a decoder of type {text['model_type']} has no GGUF form here; use the packed folder"
        )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise GraceError(f"{model.folder}: rotary scaling {kind} is not exported to GGUF; use the packed folder")
    return ARCHITECTURES[text["model_type"]]


def write_gguf(model: PackedModel, vocabulary: Vocabulary, path: Path) -> None:
    """Write the language model of a packed folder as one GGUF file, tensor by tensor, and verify it.

    Raises:
        GraceError: what `check` refuses, or a scale that is not exact in fp16.
    """
    text, arch = model.config.get("text_config", model.config), check(model)
    plan = _plan(model, text, arch)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    _describe(writer, text, arch)
    vocabulary.add_to(writer, text["vocab_size"])
    if arch is MODEL_ARCH.QWEN3VL:
        writer.add_num_deepstack_layers(len(model.config["vision_config"]["deepstack_visual_indexes"]))
    for name, entry in plan.items():
        _add_info(writer, model, name, entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress("writing GGUF", len(plan)) as advance:
        for name, entry in plan.items():
            writer.write_tensor_data(_data(model, entry))
            advance(note=name)
    writer.close()
    _verify(model, plan, path)
