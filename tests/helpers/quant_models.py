"""Tiny random models of every family, for the tests of quantisation and packing."""

import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.utils import logging

from grace.files import whole_folder
from grace.quant import LearnedStepSize, save_quantization
from grace.quant.names import quantised_module

logging.set_verbosity_error()
logging.disable_progress_bar()

TEXT = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE_TOKEN, VISUAL_TOKENS = 3, 9


def _llava():
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=96, patch_size=32,
        vision_use_head=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT, tie_word_embeddings=False), image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=VISUAL_TOKENS,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    )


def _qwen3_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {**TEXT, "head_dim": 16, "rope_parameters": rope}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))


FAMILIES = {"llava": _llava, "qwen2_vl": _qwen2_vl, "qwen3_vl": _qwen3_vl}


def tiny(family: str = "llava", seed: int = 0) -> torch.nn.Module:
    """A random fp32 model; norm gains and biases are not all ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "language_model" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def llava_batch(seed: int, tokens: int = 12) -> dict[str, torch.Tensor]:
    """One image and a sentence for the tiny LLaVA."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, 160, (1, tokens), generator=generator)
    ids = torch.cat([torch.tensor([[1] + [IMAGE_TOKEN] * VISUAL_TOKENS]), words], 1)
    pixels = torch.randn(1, 3, 96, 96, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def make_student(folder, family="llava", bits=4, group_size=32):
    """A folder as training leaves it: the model, quantised with learned step sizes, codes and scales beside it."""
    model, layers = tiny(family), {}
    for name, parameter in model.named_parameters():
        module = quantised_module(name)
        if module:
            sizes = LearnedStepSize.from_weight(parameter, bits, group_size, module)
            layers[module] = sizes.codes(parameter), sizes.scales
            parameter.data = sizes.fake_quantize(parameter).detach().float()
    with whole_folder(folder, run={"bits": bits, "method": {"tau": 3.0}}) as part:
        model.to(torch.bfloat16).save_pretrained(part)
        (part / "preprocessor_config.json").write_text("{}")
        (part / "chat_template.jinja").write_text("{{ messages }}")
        save_quantization(part, layers, bits, group_size, "lsq")
    return folder
