"""Whether a teacher and a student can be distilled: said before the expensive cache is written, not after."""

from pathlib import Path
from typing import Any

from grace.errors import GraceError, reason
from grace.families import family_of
from grace.models.load import load_processor, model_folder
from grace.models.modules import vocabulary

# What decides the pixels and the places of visual tokens; limits of size may differ, the student's are used.
_GEOMETRY = (
    "patch_size", "merge_size", "temporal_patch_size", "crop_size", "image_mean", "image_std", "rescale_factor",
    "do_normalize", "do_rescale", "vision_feature_select_strategy", "num_additional_image_tokens",
)  # fmt: skip


def head_rows(folder: str | Path) -> int:
    """Rows of a model's head, those that only pad it included, from config.json."""
    config = model_folder(folder)
    rows = (config.get("text_config") or {}).get("vocab_size") or config.get("vocab_size")
    if not isinstance(rows, int):
        raise GraceError(f"{Path(folder) / 'config.json'}: no vocab_size; fetch the model again")
    return rows


def check_pair(teacher: Path, student: Path) -> None:
    """Refuse a teacher and a student between which no logit and no visual token corresponds.

    Both read what the student's processor makes. So the same id must be the same token, that of an image the one that
    config.json names, both heads must have a row for each, and an image must be cut and normalised alike; rows that
    only pad a head do not matter.

    Raises:
        GraceError: one sentence that names the first difference.
    """
    one, other = load_processor(teacher), load_processor(student)
    size = vocabulary(other)
    _check_vocabularies(teacher, student, one.tokenizer.get_vocab(), other.tokenizer.get_vocab())
    for folder in (teacher, student):
        if head_rows(folder) < size:
            raise GraceError(
                f"{folder}: its head has {head_rows(folder)} rows and the tokenizer {size} tokens; use the model's own "
                "tokenizer"
            )
    for folder, processor in ((teacher, one), (student, other)):
        _check_image_token(folder, processor)
        try:
            family_of(processor).visual_tokens(processor, 64, 64)
        except Exception as error:  # whatever a size of another type, or of zero, makes transformers raise
            raise GraceError(
                f"{folder}: its image processor cannot count patches ({reason(error)}); fetch the model again"
            ) from error
        if lacking := family_of(processor).lacks(processor.tokenizer.get_vocab()):
            raise GraceError(f"{folder}: its tokenizer {lacking}; use the model's own tokenizer")
    for name in _GEOMETRY:
        values = [_comparable(getattr(p, name, None) or getattr(p.image_processor, name, None)) for p in (one, other)]
        if values[0] != values[1]:
            raise GraceError(
                f"{teacher} and {student}: their processors differ in {name} ({values[0]} and {values[1]}), so their "
                "visual tokens do not correspond; distil between models of one image geometry"
            )


def _check_image_token(folder: Path, processor: Any) -> None:
    """The tokenizer gives an image the id that the model looks for."""
    config = model_folder(folder)
    wanted = config.get("image_token_index", config.get("image_token_id"))
    found = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if wanted is not None and found != wanted:
        raise GraceError(
            f"{folder}: {processor.image_token} is token {found} and config.json says {wanted}; use the model's own "
            "tokenizer"
        )


def _check_vocabularies(teacher: Path, student: Path, one: dict[str, int], other: dict[str, int]) -> None:
    by_id = [{number: token for token, number in words.items()} for words in (one, other)]
    different = [
        number for number in sorted(by_id[0].keys() | by_id[1].keys()) if by_id[0].get(number) != by_id[1].get(number)
    ]
    if different:
        number = different[0]
        raise GraceError(
            f"{teacher} and {student}: {len(different)} token ids differ (id {number} is {by_id[0].get(number)!r} and "
            f"{by_id[1].get(number)!r}); distil between models of one tokenizer"
        )


def _comparable(value: Any) -> Any:
    return dict(value) if hasattr(value, "keys") else list(value) if isinstance(value, tuple | list) else value
