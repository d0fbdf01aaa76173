"""The tokenizer of a model folder as GGUF's keys: tokens, their kinds, merges or scores, special ids, chat template.

llama.cpp has its own tokenizers; two kinds are what vision-language models use. `llama` is SentencePiece's byte-pair
kind: it joins the pair whose result has the highest score, so each token's score is minus the rank of its first merge.
`gpt2` is the byte-level kind: it takes the merges themselves and knows the splitting into words by a name.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from grace.errors import GraceError
from grace.families.files import end_tokens, read_generation
from grace.files import read_json
from grace.quant.chat_template import without_bos

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of how byte-level tokenizers split a text into words, by the steps in tokenizer.json.
SPLITS = {
    (("Split", _WORDS % r"\p{N}"), ("ByteLevel", False)): "qwen2",
    (("Split", _WORDS % r"\p{N}{1,3}"), ("ByteLevel", False)): "llama-bpe",
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space


def _steps(part: dict | None) -> list[dict]:
    """A normalizer's or pre-tokenizer's steps in order."""
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("normalizers") or [part]


def _split_step(step: dict) -> tuple:
    if step["type"] == "Split":
        return "Split", step["pattern"].get("Regex")
    if step["type"] == "ByteLevel":
        return "ByteLevel", step.get("use_regex", True)
    return step["type"], step.get("individual_digits")


def _template(folder: Path, settings: dict) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return without_bos((folder / "chat_template.jinja").read_text())  # llama.cpp adds BOS
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file() and isinstance(found := read_json(folder / name).get("chat_template"), str):
            return found
    return settings.get("chat_template")


def _word(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer.

    Attributes:
        kind: "llama" or "gpt2".
        split: llama.cpp's name of the splitting into words, for "gpt2".
        tokens: the token of each id; None where an id has none.
        types: GGUF's kind of each token.
        merges: pairs in order, joined by a space, for "gpt2".
        scores: of each token, for "llama".
        special: {"bos", "eos", "eot", "unk", "pad": id} as far as they exist.
        starts: whether a text begins with the token bos.
        prefixed: whether a text begins with a space, for "llama".
        template: the chat template in Jinja, or None.
    """

    kind: str
    split: str
    tokens: list[str | None]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    starts: bool
    prefixed: bool
    template: str | None

    @classmethod
    def of_folder(cls, folder: Path) -> "Vocabulary":
        """Read `tokenizer.json` and what stands beside it; a `GraceError` says what llama.cpp could not read."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise GraceError(f"{folder}: has no tokenizer.json, from which the GGUF vocabulary is made; pack it again")
        about = json.loads(path.read_text())
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        model = about["model"]
        kind, split, prefixed = _kind(about, folder)
        ids = dict(model["vocab"])
        added = {entry["content"]: entry for entry in about.get("added_tokens", [])}
        ids |= {content: entry["id"] for content, entry in added.items()}
        tokens: list[str | None] = [None] * (max(ids.values()) + 1)
        for token, index in ids.items():
            tokens[index] = token
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        special = _special(folder, settings, ids)
        tokenizer = Tokenizer.from_file(str(path))
        return cls(
            kind,
            split,
            tokens,
            [_type(token, kind, added, model.get("unk_token")) for token in tokens],
            [" ".join(merge) for merge in merges] if kind == "gpt2" else [],
            _scores(tokens, merges, path) if kind == "llama" else [],
            special,
            "bos" in special and tokenizer.encode("a").ids[0] == special["bos"],
            prefixed,
            _template(folder, settings),
        )

    def add_to(self, writer: GGUFWriter, rows: int) -> None:
        """Write the keys for a model whose embedding has `rows` rows; ids without a token are named unused."""
        if len(self.tokens) > rows:
            raise GraceError(
                f"the tokenizer has {len(self.tokens)} tokens, but the embedding {rows} rows; copy the model's own "
                "tokenizer"
            )
        unused = rows - len(self.tokens)
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.split)
        names = [f"[PAD{index}]" if token is None else token for index, token in enumerate(self.tokens)]
        writer.add_token_list(names + [f"[PAD{index}]" for index in range(len(names), rows)])
        writer.add_token_types([*self.types, *[TokenType.UNUSED] * unused])
        if self.kind == "llama":
            writer.add_token_scores([*self.scores, *[-1e9] * unused])
            writer.add_add_space_prefix(self.prefixed)
        else:
            writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.starts)
        if self.template:
            writer.add_chat_template(self.template)


def _kind(about: dict, folder: Path) -> tuple[str, str, bool]:
    """(kind, split, prefixed) of tokenizer.json."""
    model, before = about["model"], _steps(about.get("pre_tokenizer"))
    normal = [step["type"] for step in _steps(about.get("normalizer"))]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        spaces = [step for step in before if step["type"] == "Metaspace"]
        if len(spaces) == len(before) and set(normal) <= {"Prepend", "Replace"} and (spaces or "Replace" in normal):
            prefixed = "Prepend" in normal or any(step.get("prepend_scheme") != "never" for step in spaces)
            return "llama", "default", prefixed
    elif model["type"] == "BPE" and set(normal) <= {"NFC"}:
        split = SPLITS.get(tuple(map(_split_step, before)))
        if split:
            return "gpt2", split, False
    raise GraceError(
        f"{folder / 'tokenizer.json'}: a tokenizer of type {model['type']} with "
        f"{', '.join([*normal, *(step['type'] for step in before)]) or 'no splitting'} is none that llama.cpp reads "
        "(SentencePiece's, GPT-2's, Llama 3's or Qwen's byte pairs); deploy the packed folder instead"
    )


def _type(token: str | None, kind: str, added: dict, unknown: str | None) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if kind == "llama" and token == unknown:
        return TokenType.UNKNOWN
    if token in added:
        return TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
    if kind == "llama" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _scores(tokens: list[str | None], merges: list[list[str]], path: Path) -> list[float]:
    """Minus the rank of the first merge that makes a token; 0 for what no merge makes."""
    ranks: dict[str, int] = {}
    last = -1
    for left, right in merges:
        rank = ranks.setdefault(left + right, len(ranks))
        if rank < last:
            raise GraceError(
                f"{path}: its merges are not in the order of the tokens they make, so that llama.cpp would split texts "
                "otherwise; deploy the packed folder instead"
            )
        last = rank
    return [-1.0 - ranks[token] if token in ranks else 0.0 for token in tokens]


def _special(folder: Path, settings: dict, ids: dict[str, int]) -> dict[str, int]:
    """Ids of the special tokens; generation stops at eos and, where the model has two ends, at eot."""
    found = {}
    for name in ("bos", "unk", "pad", "eos"):
        token = _word(settings.get(f"{name}_token"))
        if token in ids:
            found[name] = ids[token]
    ends = end_tokens(read_generation(folder).get("eos_token_id"))
    if ends and found.get("eos") not in ends:
        found["eos"] = ends[0]
    more = [end for end in ends if end != found.get("eos")]
    if more:
        found["eot"] = more[0]
    return found
