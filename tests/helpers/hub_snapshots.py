"""Small pretrained models in the form that the hub has them: config, tokenizer, processor and weights of each family.

config.json is written as it is published (Qwen2-VL's text settings stand at the top), weights carry the published names
and dtype, and the image processor's file is the old one that stands beside older models.
"""

import json
from pathlib import Path
from typing import Any

import torch
from chat_models import LLAVA_TEMPLATE, QWEN_TEMPLATE, byte_level, sentencepiece
from real_sizes import TOKENS, real_config
from transformers import AutoConfig, AutoModelForImageTextToText

from grace.families import FAMILIES
from grace.quant.checkpoint import rename_weights

SIZES = {"student": (128, 256, 2), "teacher": (256, 384, 3)}  # width, inner width, layers
HEAD = 128  # rows of a head are a multiple of this
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's


def _decoder(role: str, **more: Any) -> dict[str, Any]:
    width, inner, layers = SIZES[role]
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.2, **more,
    }  # fmt: skip


def _llava(role: str, words: Any, rows: int) -> dict[str, Any]:
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_hidden_layers": 3, "image_size": 64, "patch_size": 16, "projection_dim": 32, "vocab_size": 32000,
    }  # fmt: skip
    text = _decoder(role, model_type="llama", rms_norm_eps=1e-5, vocab_size=rows, torch_dtype="float16")
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
        "image_token_index": words.convert_tokens_to_ids("<image>"), "pad_token_id": words.pad_token_id,
        "projector_hidden_act": "gelu", "text_config": text, "vision_config": vision, "torch_dtype": "float16",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": rows,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _qwen_ids(words: Any) -> dict[str, Any]:
    ids = {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end", "image_token_id": "image_pad"}
    return {
        key: words.convert_tokens_to_ids(f"<|{name}|>") for key, name in (ids | {"video_token_id": "video_pad"}).items()
    }


def _qwen2_vl(role: str, words: Any, rows: int) -> dict[str, Any]:
    half = SIZES[role][0] // 8  # of a head's dimensions
    vision = {
        "depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": SIZES[role][0],
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    }  # fmt: skip
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", **_qwen_ids(words),
        "bos_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id,
        **_decoder(role, rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=rows, torch_dtype="bfloat16"),
        "rope_scaling": {"type": "mrope", "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]},
        "vision_config": vision, "tie_word_embeddings": role == "student", "use_sliding_window": False,
    }  # fmt: skip


def _qwen2_5_vl(role: str, words: Any, rows: int) -> dict[str, Any]:
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_chans": 3,
        "out_hidden_size": SIZES[role][0], "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    kind = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    return {**_qwen2_vl(role, words, rows), **kind, "vision_config": vision}


def _qwen3_vl(role: str, words: Any, rows: int) -> dict[str, Any]:
    half = SIZES[role][0] // 8
    rope = {
        "mrope_interleaved": True,
        "mrope_section": [half - half // 3 * 2, half // 3, half // 3],
        "rope_type": "default",
    }
    text = _decoder(
        role, model_type="qwen3_vl_text", head_dim=2 * half, rms_norm_eps=1e-6, rope_theta=5e6, rope_scaling=rope,
        vocab_size=rows, dtype="bfloat16", tie_word_embeddings=role == "student",
    )  # fmt: skip
    vision = {
        "model_type": "qwen3_vl", "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "in_channels": 3,
        "out_hidden_size": SIZES[role][0], "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", **_qwen_ids(words),
        "text_config": text, "vision_config": vision, "tie_word_embeddings": role == "student",
    }  # fmt: skip


CONFIGS = {"llava": _llava, "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}


def _write_images(folder: Path, family: str, side: int, patch: int) -> None:
    """preprocessor_config.json, and LLaVA's processor_config.json for images of `side` pixels."""
    if family == "llava":
        about = {
            "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "do_center_crop": True,
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
            "crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}, "image_mean": MEAN,
            "image_std": STD,
            "rescale_factor": 1 / 255,
        }  # fmt: skip
        more = {
            "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": patch,
            "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default",
        }  # fmt: skip
        _write(folder / "processor_config.json", more)
    else:
        new = family == "qwen3_vl"
        about = {
            "patch_size": 16 if new else 14, "temporal_patch_size": 2, "merge_size": 2,
            "image_mean": [0.5] * 3 if new else MEAN, "image_std": [0.5] * 3 if new else STD,
            "image_processor_type": "Qwen2VLImageProcessorFast" if new else "Qwen2VLImageProcessor",
            "processor_class": FAMILIES[family].processor,
            **({"size": {"longest_edge": 16_777_216, "shortest_edge": 4096}} if new
               else {"min_pixels": 3136, "max_pixels": 12_845_056}),
        }  # fmt: skip
    _write(folder / "preprocessor_config.json", about)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2))


def snapshot(folder: Path, family: str, role: str, real: bool = False, device: str = "cpu") -> Path:
    """Write a model of random weights; `role` is student or teacher, whose head is padded by more rows.

    `real`: of the published size and image geometry, made on `device`, with as many tokens as the real tokenizer has.
    """
    folder.mkdir(parents=True)
    words = _words(family, real)
    words.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    kind = (
        {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        if family == "llava"
        else {"tokenizer_class": "Qwen2Tokenizer"}
    )
    _write(folder / "tokenizer_config.json", {**settings, **kind})
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _write(folder / "chat_template.json", {"chat_template": LLAVA_TEMPLATE if family == "llava" else QWEN_TEMPLATE})
    _write_images(folder, family, *((336, 14) if real else (64, 16)))
    rows = -(-len(words) // HEAD) * HEAD + (HEAD if role == "teacher" and family != "llava" else 0)
    config = CONFIGS[family](role, words, rows)
    _write(folder / "config.json", real_config(config, family, role) if real else config)
    _write(folder / "generation_config.json", {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id})
    _write_weights(folder, family, role, real, device)
    return folder


def _words(family: str, real: bool) -> Any:
    make = sentencepiece if family == "llava" else byte_level
    if not real:
        return make()
    control = len(make()) - len(make().backend_tokenizer.get_vocab(with_added_tokens=False))
    return make(TOKENS[family] - control)


def _write_weights(folder: Path, family: str, role: str, real: bool, device: str) -> None:
    """Random weights under their published names, in shards as the hub has them."""
    dtype = torch.float16 if family == "llava" else torch.bfloat16
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(len(family) + len(role))
        made_in = {"dtype": torch.bfloat16} if real else {}
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), **made_in)
        with torch.no_grad():
            for name, parameter in () if real else model.named_parameters():
                if "language_model" not in name and "lm_head" not in name and parameter.ndim > 1:
                    parameter.mul_(4)  # an image that is seen changes the answer
    published = {name: (folder / name).read_text() for name in ("config.json", "generation_config.json")}
    model.to(dtype).save_pretrained(folder, max_shard_size="5GB")
    rename_weights(folder, FAMILIES[family].published)
    for name, text in published.items():
        (folder / name).write_text(text)
