"""Tiny random models of every family that a program can talk to: tokenizers, towers and templates of the real kinds."""

import json
from pathlib import Path

import torch
from PIL import Image
from quant_models import TEXT
from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipVisionConfig,
)

from grace.families import family_of
from grace.files import whole_folder
from grace.quant import LearnedStepSize, save_quantization
from grace.quant.chat_template import write_bos
from grace.quant.checkpoint import name_as_published
from grace.quant.names import quantised_module

CORPUS = ["what is in this image? a red shirt on a white wall", "how many boots are there? two black boots", "yes no"]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 512
LLAVA_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'].upper() + ': ' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<image>{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
QWEN_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def _filled(known: list[str], pieces: int) -> list[str]:
    """`known`, and behind it pieces that no text is ever made of, until there are `pieces`."""
    return [*known, *(f"▁unused{number}" for number in range(pieces - len(known)))]


def sentencepiece(pieces: int = 0) -> PreTrainedTokenizerFast:
    """Of Llama's kind: spaces as a letter, unknown letters as bytes, a token that begins every text.

    `pieces`: as many as a real one has, control tokens behind them; 0: as few as it takes.
    """
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90, special_tokens=special))
    about = json.loads(trained.to_str())["model"]
    learned = [token for token in sorted(about["vocab"], key=about["vocab"].get) if token not in special]
    every = _filled([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned], pieces)
    raw = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(every)},
            [tuple(merge) for merge in about["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([*special, "<image>"])
    raw.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def byte_level(pieces: int = 0) -> PreTrainedTokenizerFast:
    """Of Qwen's kind: bytes, its splitting into words, no token that begins a text. `pieces`: see `sentencepiece`."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Pattern(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(CORPUS, trainer)
    if pieces:
        about = json.loads(raw.to_str())["model"]
        every = _filled(sorted(about["vocab"], key=about["vocab"].get), pieces)
        raw.model = models.BPE(
            {piece: number for number, piece in enumerate(every)}, [tuple(merge) for merge in about["merges"]]
        )
    raw.add_special_tokens(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"]
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )  # fmt: skip


def _text(tokenizer, width: int) -> dict:
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    heads = width // 32  # 32 wide: vLLM's least on a CPU
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    if width != TEXT["hidden_size"]:
        sizes["intermediate_size"] = 2 * width
    calm = {"initializer_range": 0.96 / width**0.5}  # rounding to 16 bits moves an answer far less than another image
    return TEXT | ends | sizes | calm | {"vocab_size": VOCABULARY, "max_position_embeddings": 4096}


def _llava(tower: str, width: int):
    tokenizer = sentencepiece()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    if tower == "clip":
        vision, rule, extra = CLIPVisionConfig(**sizes, num_hidden_layers=3), "default", 1
    else:
        vision, rule, extra = SiglipVisionConfig(**sizes, num_hidden_layers=2, vision_use_head=False), "full", 0
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_text(tokenizer, width), tie_word_embeddings=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2 if extra else -1, vision_feature_select_strategy=rule, image_seq_length=16,
    )  # fmt: skip
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        tokenizer=tokenizer, patch_size=16, vision_feature_select_strategy=rule, num_additional_image_tokens=extra,
        chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _qwen(family: str, width: int, tied: bool):
    tokenizer = byte_level()
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = {**_text(tokenizer, width), "rope_parameters": rope}
    tokens = {
        name: tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in {
            "image_token_id": "image_pad", "video_token_id": "video_pad",
            "vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end",
        }.items()
    }  # fmt: skip
    ends, patch = {**tokens, "tie_word_embeddings": tied}, 14
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ends))
    elif family == "qwen2_5_vl":
        vision = {
            "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": width,
            "fullatt_block_indexes": [1, 3],
        }  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ends))
    else:
        patch = 16
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": width,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        }  # fmt: skip
        text |= {"head_dim": 32, "tie_word_embeddings": tied}  # as published, in both places
        text["rope_parameters"] = {**rope, "mrope_interleaved": True}  # as published; readers look for it
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ends))
    images = Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": 8 * 4 * patch**2, "longest_edge": 1024 * 4 * patch**2}
    )
    return model, images_only(Qwen3VLProcessor if family == "qwen3_vl" else Qwen2VLProcessor, images, tokenizer)


def images_only(whole: type, images, tokenizer):
    """A Qwen processor without its part for videos, which needs torchvision, under its own name."""

    def start(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        whole.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)

    return type(whole.__name__, (whole,), {"__init__": start})(images, tokenizer, QWEN_TEMPLATE)


FAMILIES = {
    "llava-clip": lambda width=64: _llava("clip", width),
    "llava-siglip": lambda width=64: _llava("siglip", width),
    "qwen2_vl": lambda width=64, tied=False: _qwen("qwen2_vl", width, tied),
    "qwen2_5_vl": lambda width=64, tied=False: _qwen("qwen2_5_vl", width, tied),
    "qwen3_vl": lambda width=64, tied=False: _qwen("qwen3_vl", width, tied),
}

ONE_EACH = [name for name in FAMILIES if name != "llava-siglip"]
"""One model of each family."""

SIDES = {"llava-clip": 64, "llava-siglip": 64, "qwen2_vl": 112, "qwen2_5_vl": 112, "qwen3_vl": 128}
"""Pixels a side of an image that no program resizes."""


def talking_student(
    folder: Path, family: str, seed: int = 0, bits: int = 4, group_size: int = 32, width: int = 64, **more: bool
) -> Path:
    """A quantised student with all that stands beside a published model.

    `width`: its decoder's, 64 or more; `tied=True`: a Qwen whose head is its embeddings, as published ones of 2B.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = FAMILIES[family](width, **more)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "language_model" not in name and "lm_head" not in name:
                    parameter.mul_(4 if parameter.ndim > 1 else 1)  # an image that is seen changes the answer
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    layers = {}
    for name, parameter in model.named_parameters():
        if module := quantised_module(name):
            sizes = LearnedStepSize.from_weight(parameter, bits, group_size, module)
            layers[module] = sizes.codes(parameter), sizes.scales
            parameter.data = sizes.fake_quantize(parameter).detach().float()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    with whole_folder(folder, run={"bits": bits}) as part:
        model.to(torch.bfloat16).save_pretrained(part)
        name_as_published(part, family_of(model).published)
        processor.save_pretrained(part)
        write_bos(part)
        if "qwen" in family:  # as published: readers build the processor with its part for videos
            videos = json.loads(processor.image_processor.to_json_string())
            videos |= {"video_processor_type": "Qwen2VLVideoProcessor"}
            (part / "video_preprocessor_config.json").write_text(json.dumps(videos))
        save_quantization(part, layers, bits, group_size, "lsq")
    return folder


def blocks(side: int, seed: int = 0) -> Image.Image:
    """A square of coloured blocks that survives PNG exactly."""
    values = torch.randint(0, 255, (4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy()).resize((side, side), Image.Resampling.NEAREST)
