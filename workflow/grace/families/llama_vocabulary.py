"""The tokenizer of a folder that has SentencePiece's own tokenizer.model and no tokenizer.json, as Llama's first folders do.

transformers (5.20 to 5.23) reads such a folder in two ways that give other tokens than SentencePiece. Where config.json says
llava it takes a class that puts no space before a text. And it orders merges by the pieces' ids, where SentencePiece joins the
pair whose piece has the highest score: Llama's runs of spaces come early in the vocabulary and last in the merges, so that
"A  dog" would become other tokens. So the class is named here, and the merges are put into their own order.
"""

from pathlib import Path
from typing import Any


def read_sentencepiece(folder: Path) -> Any:
    """The LlamaTokenizer of `folder`/tokenizer.model."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers.models import BPE
    from transformers import LlamaTokenizer

    tokenizer: Any = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
    read: Any = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
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
