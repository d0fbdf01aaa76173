"""Small LLaVA models, processors and benchmarks for the evaluation's tests: random, but real transformers objects."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from grace.files import write_manifest

WORDS = [
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
    "<image>",
    "<q>",
    "<a>",
    "what",
    "is",
    "the",
    "where",
    "a",
    "blue",
    "red",
    "yes",
    "no",
    "dress",
    "bag",
    "boot",
    "top",
    "left",
    "one",
    "two",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %} <image>{% else %}"
    " <q> {{ part['text'] }}{% endif %}{% endfor %} <a>{% else %}"
    "{% generation %} {{ message['content'][0]['text'] }} <eos>"
    "{% endgeneration %}{% endif %}{% endfor %}"
)
SIZE = 32  # pixels; four visual tokens


def processor():
    """A word-level tokenizer with a chat template, and SigLIP's preprocessing."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<q>", "<a>"],
    )
    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlavaForConditionalGeneration:
    """Two decoder layers of width 32 behind one vision layer; weights from `seed`."""
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=16,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=4,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LlavaForConditionalGeneration(config)
        for parameter in made.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = 3, 0
    return made.to(dtype).eval()


def make_image(seed: int) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    kept = io.BytesIO()
    Image.fromarray(pixels).save(kept, "PNG")
    return kept.getvalue()


def rows(count: int, answers: tuple[str, ...] = ("red", "blue"), seed: int = 0) -> list[dict]:
    """Benchmark rows, two questions to an image, of several lengths."""
    random = np.random.default_rng(seed)
    ask = ("what is the dress", "where is the blue bag", "what is a boot", "is the top left a red bag")
    return [
        {
            "id": f"row-{i}",
            "image": {"bytes": make_image(seed * 1000 + i // 2), "path": f"{i // 2}.png"},
            "image_id": f"image-{i // 2}",
            "question": ask[random.integers(len(ask))],
            "answer": answers[random.integers(len(answers))],
            "options": [],
            "group": "",
            "sources": [f"noise/{i // 2}"],
        }
        for i in range(count)
    ]


def write_benchmark(path, made: list[dict]) -> None:
    """Write rows in the demo's benchmark format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("image_id", pa.string()),
            ("question", pa.string()),
            ("answer", pa.string()),
            ("options", pa.list_(pa.string())),
            ("group", pa.string()),
            ("sources", pa.list_(pa.string())),
        ]
    )
    pq.write_table(pa.Table.from_pylist(made, schema=schema), path)


def write_model(folder, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Write a whole model folder: weights, processor, manifest."""
    model(dtype, seed).save_pretrained(folder)
    processor().save_pretrained(folder)
    write_manifest(folder)


def write_asked(folder):
    """A model, and two benchmarks to ask it: `colour` and `presence`."""
    write_model(folder / "model")
    write_benchmark(folder / "data/benchmarks/colour.parquet", rows(12))
    write_benchmark(folder / "data/benchmarks/presence.parquet", rows(12, ("yes", "no"), 1))
