"""The vision tower and projector of a packed folder as the `mmproj` file that llama.cpp keeps beside a language model.

Names and keys are those of llama.cpp's multimodal library (`tools/mtmd`); matrices stay bf16, what it convolves or adds
is fp32. What its graphs cannot compute as the model does is refused.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, VisionProjectorType, get_tensor_name_map
from gguf.constants import MODEL_ARCH

from grace.errors import GraceError
from grace.families import family_of_folder
from grace.files import read_json
from grace.progress import progress
from grace.quant.packed import OUTSIDE, PackedModel

_ACTIVATIONS = {
    "quick_gelu": None,  # llama.cpp's default
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "silu": "silu",
}
_QWEN_SIDE = 560  # only sizes llama.cpp's first buffers: these towers take any size
_WINDOW = 112  # pixels a side of Qwen2.5-VL's attention windows in llama.cpp
_RENAMED = {
    "multi_modal_projector.linear_1": "mm.0",
    "multi_modal_projector.linear_2": "mm.2",
    "visual.merger.mlp.0": "mm.0",
    "visual.merger.mlp.2": "mm.2",
    "visual.merger.norm": "v.post_ln",
    "visual.merger.linear_fc1": "mm.0",
    "visual.merger.linear_fc2": "mm.2",
}
_DEEPSTACK = re.compile(r"^visual\.deepstack_merger_list\.(\d+)\.(norm|linear_fc1|linear_fc2)$")
_LEFT_OUT = ("vision_tower.vision_model.post_layernorm", "vision_tower.vision_model.head.")


def check(model: PackedModel) -> None:
    """Raise a `GraceError` where llama.cpp cannot see as the model does."""
    config, vision = model.config, model.config.get("vision_config") or {}
    kind = config.get("model_type")
    if kind == "llava":
        reason = _llava_reason(config, vision)
    elif kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        reason = _qwen_reason(kind, vision)
    else:
        reason = f"a vision side of type {kind} has no GGUF form here"
    if reason:
        raise GraceError(f"{model.folder}: {reason}; deploy the packed folder instead")
    _pixels(model.folder)


def _llava_reason(config: dict, vision: dict) -> str | None:
    clip = vision.get("model_type") == "clip_vision_model"
    if not clip and vision.get("model_type") != "siglip_vision_model":
        return f"llama.cpp takes a CLIP or SigLIP tower in a LLaVA, not {vision.get('model_type')}"
    if vision.get("hidden_act", "quick_gelu" if clip else "gelu_pytorch_tanh") not in _ACTIVATIONS:
        return f"llama.cpp has no vision activation {vision['hidden_act']}"
    if (config.get("vision_feature_select_strategy", "default") == "default") != clip:
        return "llama.cpp leaves out a CLIP tower's class token and none of SigLIP's patches, which this model does not"
    if not isinstance(config.get("vision_feature_layer", -2), int):
        return "several vision feature layers at once are not exported"
    if config.get("projector_hidden_act", "gelu") not in ("gelu", "gelu_pytorch_tanh"):
        return f"llama.cpp's LLaVA projector computes GELU, not {config['projector_hidden_act']}"
    return None


def _qwen_reason(kind: str, vision: dict) -> str | None:
    if vision.get("temporal_patch_size", 2) != 2:
        return "llama.cpp takes pairs of frames alone (temporal_patch_size 2)"
    if kind == "qwen2_5_vl":
        full = vision.get("fullatt_block_indexes") or []
        if not full or any(later - one != full[0] + 1 for one, later in pairwise(full)):
            return f"llama.cpp wants evenly spaced blocks of full attention, not {full}"
        if vision.get("window_size", _WINDOW) != _WINDOW:
            return f"llama.cpp's attention windows are {_WINDOW} pixels wide, this model's {vision['window_size']}"
    return None


def _pixels(folder: Path) -> dict:
    """`image_mean` and `image_std` of the image processor."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            about = read_json(folder / name)
            about = about.get("image_processor", about)
            if "image_mean" in about and "image_std" in about:
                return about
    raise GraceError(f"{folder}: no image processor with image_mean and image_std; copy the model's processor files")


def _describe(writer: GGUFWriter, config: dict, vision: dict, pixels: dict, blocks: int) -> None:
    kind, llava = config["model_type"], config["model_type"] == "llava"
    width: int = vision["embed_dim"] if kind == "qwen2_vl" else vision["hidden_size"]
    inner = round(width * vision["mlp_ratio"]) if kind == "qwen2_vl" else vision["intermediate_size"]
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(inner)
    writer.add_vision_block_count(blocks)
    writer.add_vision_head_count(vision["num_attention_heads"] if llava else vision["num_heads"])
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_attention_layernorm_eps(vision.get("layer_norm_eps", 1e-6 if not llava else 1e-5))
    writer.add_vision_image_mean(pixels["image_mean"])
    writer.add_vision_image_std(pixels["image_std"])
    act = _ACTIVATIONS[vision.get("hidden_act", "quick_gelu")]
    if act == "gelu":
        writer.add_vision_use_gelu(True)
    if act == "silu":
        writer.add_vision_use_silu(True)
    if llava:
        writer.add_clip_projector_type("mlp")
        writer.add_vision_image_size(vision["image_size"])
        layer = config.get("vision_feature_layer", -2)
        writer.add_array("clip.vision.feature_layer", [layer if layer >= 0 else blocks + 1 + layer])
        return
    side = round(vision.get("num_position_embeddings", 0) ** 0.5) * vision["patch_size"] or _QWEN_SIDE
    writer.add_vision_image_size(side)
    writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
    if kind == "qwen2_vl":
        writer.add_clip_projector_type(VisionProjectorType.QWEN2VL)
    elif kind == "qwen2_5_vl":
        writer.add_clip_projector_type(VisionProjectorType.QWEN25VL)
        writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)
    else:
        writer.add_clip_projector_type(VisionProjectorType.QWEN3VL)
        deep = vision["deepstack_visual_indexes"]
        writer.add_vision_is_deepstack_layers([block in deep for block in range(blocks)])


def _tensors(model: PackedModel, vision: dict, blocks: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the file, tensor), one by one."""
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, blocks)
    split = model.config["model_type"] in ("qwen2_vl", "qwen2_5_vl")
    published = family_of_folder(model.folder).published
    for key in model.kept:
        plain = published(key).removeprefix("model.")
        if not plain.startswith(OUTSIDE) or plain.startswith(_LEFT_OUT):
            continue
        tensor = model.tensors[key]
        module, _, kind = plain.rpartition(".")
        if module == "visual.patch_embed.proj" and kind == "weight":
            yield "v.patch_embd.weight", tensor[:, :, 0]
            yield "v.patch_embd.weight.1", tensor[:, :, 1]
        elif plain.endswith("class_embedding"):
            yield "v.class_embd", tensor
        elif found := _DEEPSTACK.match(module):
            block = vision["deepstack_visual_indexes"][int(found[1])]
            yield f"v.deepstack.{block}.{found[2].removeprefix('linear_')}.{kind}", tensor
        elif split and module.endswith(".qkv"):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{names.get_name(f'{module[:-3]}{part}')}.{kind}", piece
        else:
            name = _RENAMED.get(module) or names.get_name(module)
            if name is None:
                raise GraceError(
                    f"{model.folder}: {key} has no place in llama.cpp's vision file; use the packed folder"
                )
            yield f"{name}.{kind}", tensor
    if model.config["model_type"] == "llava" and not model.config.get("multimodal_projector_bias", True):
        width = model.config["text_config"]["hidden_size"]
        for name in ("mm.0.bias", "mm.2.bias"):
            yield name, torch.zeros(width)


def _whole(name: str, tensor: torch.Tensor) -> bool:
    """Whether llama.cpp wants fp32: what it convolves, looks up or adds."""
    return tensor.ndim != 2 or name.startswith(("v.position_embd", "v.patch_embd"))


def write_vision(model: PackedModel, path: Path) -> None:
    """Write the tower and projector of a packed folder, each tensor once, streamed.

    Raises:
        GraceError: what `check` refuses.
    """
    check(model)
    vision = model.config["vision_config"]
    blocks = vision["num_hidden_layers"] if model.config["model_type"] == "llava" else vision["depth"]
    writer = GGUFWriter(path, "clip", use_temp_file=False)
    writer.add_type("mmproj")
    _describe(writer, model.config, vision, _pixels(model.folder), blocks)
    count = 0
    for name, tensor in _tensors(model, vision, blocks):
        count += 1
        if _whole(name, tensor):
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), 4 * tensor.numel())
        else:
            rows, width = tensor.shape[0], 2 * tensor.shape[1]
            writer.add_tensor_info(name, (rows, width), np.dtype(np.uint8), rows * width, GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress("writing the vision file", count) as advance:
        for name, tensor in _tensors(model, vision, blocks):
            if _whole(name, tensor):
                data = tensor.float().contiguous().numpy()
            else:
                data = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.write_tensor_data(data)
            advance(note=name)
    writer.close()
