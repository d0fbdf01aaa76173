"""Tiny models for the tests of inference and benchmarks: a random LLaVA, plain and packed, with its processor; Qwen."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from grace.kernels.w4a16_layout import dequantise, pack_int4
from grace.models import load_model

WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<image>",
    "<q>",
    "<a>",
    "<unk>",
    "what",
    "is",
    "this",
    "colour",
    "red",
    "a",
    "shirt",
]
TEMPLATE = (
    "<bos>{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% endif %}{% endfor %}<q> "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} <a>"
    "{% endif %}{% endfor %}"
)
VOCABULARY = 160


def save_processor(folder: Path) -> None:
    """A word-level tokenizer and LLaVA's processor for 96 x 96 images in patches of 32: 9 visual tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

    words = WORDS + [f"word{i}" for i in range(VOCABULARY - len(WORDS))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>", "<q>", "<a>"],
    )  # fmt: skip
    LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 96, "width": 96}),
        tokenizer=tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        image_token="<image>",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def save_llava(folder: Path, seed: int = 0, heads: int = 4, key_value_heads: int = 4) -> Path:
    """A random LLaVA in bf16: Siglip tower, Llama decoder of width 64 with two layers."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=96,
            patch_size=32, vision_use_head=False,
        ),
        text_config=LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=heads,
            num_key_value_heads=key_value_heads, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            max_position_embeddings=256, initializer_range=0.2,
        ),
        image_token_id=3, vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=9,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


def save_packed(plain: Path, folder: Path, group_size: int = 32) -> Path:
    """Round a plain folder's decoder to nearest, and write it twice: packed, and dequantised in `folder`-plain."""
    folder.mkdir(parents=True, exist_ok=True)
    twin = folder.with_name(folder.name + "-plain")
    twin.mkdir(exist_ok=True)
    packed, dequantised = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        dequantised[name] = tensor
        if "language_model" not in name or not name.endswith("_proj.weight"):
            packed[name] = tensor
            continue
        groups = tensor.float().view(len(tensor), -1, group_size)
        scales = (groups.abs().amax(-1) / 7.5).bfloat16()
        codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).view(tensor.shape)
        stem = name.removesuffix("weight")
        packed |= {
            f"{stem}weight_packed": pack_int4(codes),
            f"{stem}weight_scale": scales,
            f"{stem}weight_shape": torch.tensor(tensor.shape),
        }
        dequantised[name] = dequantise(codes, scales, torch.bfloat16)
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    save_file(dequantised, twin / "model.safetensors", {"format": "pt"})
    for other in plain.iterdir():
        if other.suffix != ".safetensors":
            (folder / other.name).write_bytes(other.read_bytes())
            (twin / other.name).write_bytes(other.read_bytes())
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size,
                },
            }
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def llava_7b(layers: int = 32) -> "transformers.LlavaConfig":  # noqa: F821
    """LLaVA-1.5-7B's config."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = transformers.LlamaConfig(vocab_size=32064, num_hidden_layers=layers)
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000)


def qwen(version: int, **changes) -> torch.nn.Module:
    """A random Qwen2-VL or Qwen3-VL (with deepstack), of two to three layers but for changes of its decoder."""
    import transformers

    kind = f"Qwen{version}VL"
    text = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=version, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=160, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0, head_dim=16,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    ) | changes  # fmt: skip
    vision = {
        2: dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2),
        3: dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, patch_size=14,
            num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
        ),
    }[version]  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, image_token_id=3, vision_start_token_id=4, vision_end_token_id=5,
        video_token_id=6,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model


def qwen_inputs() -> dict[str, torch.Tensor]:
    """Two prompts of 11 tokens, the first one padded, each with an image of 2 x 2 visual tokens."""
    ids = torch.tensor([[0, 0, 1, 4, 3, 3, 3, 3, 5, 20, 21], [1, 22, 25, 4, 3, 3, 3, 3, 5, 30, 31]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(32, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == 3).int(),
    }


QUESTIONS = ["what is this", "what colour is this red shirt", "is"]


def make_image(seed: int) -> Image.Image:
    """An image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (80, 120, 3), dtype=np.uint8))


def theirs(folder, prompts, new_tokens):
    """What transformers' own `generate` answers."""
    model = load_model(folder, dtype=torch.float32)
    return model.generate(**prompts, max_new_tokens=new_tokens, do_sample=False)[:, prompts["input_ids"].shape[1] :]
