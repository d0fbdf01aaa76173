"""The published sizes of the shipped experiments' models: what their config.json has in place of a small snapshot's."""

from typing import Any

CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
TOKENS = {"llava": 32_002, "qwen2_vl": 151_657, "qwen3_vl": 151_669}
"""Of the tokenizer, control tokens included; a head has more rows."""


def _llama(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "initializer_range": 0.02,
    }  # fmt: skip


def _qwen2(width: int, inner: int, heads: int, shared: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 28, "num_attention_heads": heads,
        "num_key_value_heads": shared, "vocab_size": rows, "initializer_range": 0.02, "max_position_embeddings": 32768,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": width},
    }  # fmt: skip


def _qwen3(width: int, inner: int, layers: int, heads: int, tower: dict[str, Any]) -> dict[str, Any]:
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text = {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "initializer_range": 0.02,
        "rope_scaling": rope,
    }  # fmt: skip
    return {
        "text_config": text,
        "vision_config": {**tower, "out_hidden_size": width, "num_heads": 16, "num_position_embeddings": 2304},
    }


CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "llava": {
        "teacher": {"vocab_size": 32_064, "text_config": {**_llama(5120, 13824, 40, 40), "vocab_size": 32_064},
            "vision_config": CLIP_L},
        "student": {"vocab_size": 32_064, "text_config": {**_llama(4096, 11008, 32, 32), "vocab_size": 32_064},
            "vision_config": CLIP_L},
    },
    "qwen2_vl": {
        "teacher": _qwen2(3584, 18944, 28, 4, 152_064),
        "student": _qwen2(1536, 8960, 12, 2, 151_936),
    },
    "qwen3_vl": {
        "teacher": _qwen3(
            4096, 12288, 36, 32,
            {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
        ),
        "student": _qwen3(
            2048, 6144, 28, 16,
            {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
        ),
    },
}  # fmt: skip
"""By family and role: keys of config.json, to be put over those of a small snapshot. Weights are the teacher's and
student's of the paper's Tables 1 to 3 and of the authors' release."""


def real_config(small: dict[str, Any], family: str, role: str) -> dict[str, Any]:
    """config.json of the real size, from that of a small snapshot."""
    return _over(small, CHANGES[family][role])


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _over(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }
    return {**below, **both}
