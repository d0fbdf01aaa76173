"""The tokenizer of a folder that has SentencePiece's own tokenizer.model and no tokenizer.json, as Llama's first
folders do.

transformers (5.20 to 5.23) reads such a folder in two ways that give other tokens than SentencePiece. Where config.json
says llava it takes a class that puts no space before a text. And it orders merges by the pieces' ids, where
SentencePiece joins the pair whose piece has the highest score: Llama's runs of spaces come early in the vocabulary and
last in the merges, so that "A  dog" would become other tokens. So the class is named here, the merges are put into
their own order, and whether a space comes before a text is read from the model.
"""

from pathlib import Path
from typing import Any, cast

from grace.errors import GraceError


def read_sentencepiece(folder: Path) -> Any:
    """The LlamaTokenizer of `folder`/tokenizer.model; a `GraceError` where that is no model of Llama's kind."""
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from tokenizers.models import BPE
    from transformers import LlamaTokenizer

    path = folder / "tokenizer.model"
    try:
        about: Any = cast(Any, sentencepiece_model_pb2).ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise GraceError(f"{path}: no SentencePiece model, or a damaged one; fetch the model again") from None
    rules, kind = about.normalizer_spec, about.trainer_spec
    other = {
        "it is no byte-pair encoding": kind.model_type != kind.BPE,
        "it changes texts before it cuts them": bool(rules.precompiled_charsmap) or rules.remove_extra_whitespaces,
        "it puts spaces behind words": kind.treat_whitespace_as_suffix,
    }
    for said, true in other.items():
        if true:
            raise GraceError(f"{path}: {said}, unlike Llama's; save the tokenizer as tokenizer.json beside it")
    tokenizer: Any = LlamaTokenizer.from_pretrained(
        folder, local_files_only=True, add_prefix_space=rules.add_dummy_prefix
    )
    read: Any = SentencePieceProcessor(model_file=str(path))
    scores = {read.id_to_piece(number): read.get_score(number) for number in range(read.get_piece_size())}
    merges = [
        (-score, -len(piece), at, piece)  # of equal scores SentencePiece takes the leftmost pair, as this order does
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    now = tokenizer.backend_tokenizer.model
    tokenizer.backend_tokenizer.model = BPE(
        vocab={piece: number for number, piece in enumerate(scores)},
        merges=[(piece[:at], piece[at:]) for _, _, at, piece in sorted(merges)],
        unk_token=now.unk_token,
        fuse_unk=now.fuse_unk,
        byte_fallback=now.byte_fallback,
    )
    return tokenizer
