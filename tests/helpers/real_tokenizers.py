"""Tokenizers of the real vocabularies, from files inside published packages: what a model's own folder has.

Mistral's SentencePiece model of 32,000 pieces is of Llama's kind in all that LLaVA-1.5 needs of it; Qwen's byte-level
BPE is the one that Qwen2-VL, Qwen2.5-VL and Qwen3-VL have. The packages are test material alone
(envs/test-material.txt).
"""

import base64
import importlib.util
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

from transformers import Qwen2Tokenizer

from grace.families.llama_vocabulary import read_sentencepiece

PRETOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>",
            "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
            "<|image_pad|>", "<|video_pad|>"]  # fmt: skip


def file_in(package: str, name: str) -> Path:
    """A file that a package ships, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise AssertionError(f"{package} is test material: bash workflow/setup.sh test")
    return Path(spec.submodule_search_locations[0]) / name


def llama(folder: Path, legacy: bool):
    """`folder` as a hub folder with tokenizer.model alone, and its tokenizer as this pipeline reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(file_in("mistral_common", "data/tokenizer.model.v1").read_bytes())
    about = {
        "tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "bos_token": "<s>",
        "eos_token": "</s>", "unk_token": "<unk>", "extra_special_tokens": {"image_token": "<image>"},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return read_sentencepiece(folder)


@cache
def qwen_ranks() -> dict[bytes, int]:
    """Bytes of every token below the control tokens, and its rank."""
    lines = file_in("dashscope", "resources/qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


@cache
def qwen() -> Qwen2Tokenizer:
    """Qwen's own tokenizer; its merges follow from the ranks."""
    ranks, letters = qwen_ranks(), _letters()
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = _last_two(token, ranks, rank)
            merges.append(("".join(letters[byte] for byte in left), "".join(letters[byte] for byte in right)))
    vocabulary |= {token: len(ranks) + place for place, token in enumerate(CONTROLS)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=CONTROLS,
    )


def _last_two(token: bytes, ranks: dict[bytes, int], rank: int) -> tuple[bytes, bytes]:
    """The two parts that join last when a token is made from its bytes by lower ranks alone."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
