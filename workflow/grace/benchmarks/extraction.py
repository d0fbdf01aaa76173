"""An answer, and what of it counts under each protocol; every reader by the name that the protocols use."""

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grace.benchmarks import letters, open_answers, vqa, yes_no
from grace.benchmarks.letters import Options

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: the answer without special tokens, stripped.
        logprob: natural logarithm of the probability of the answer's tokens and of the end token behind them.
        entropy: of the distribution that the first token was taken from, in nats.
    """

    text: str
    logprob: float
    entropy: float


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces: lm-eval's `ignore_case` and `ignore_punctuation`, and trimmed."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def several(target: str) -> list[str]:
    """A target's right answers: those of a JSON list (annotators, open questions), else itself."""
    try:
        found = json.loads(target) if target.startswith("[") else None
    except ValueError:
        found = None
    return [str(each) for each in found] if isinstance(found, list) else [target]


def _lmms_mmmu(text: str, options: Options, target: str) -> str:
    return letters.lmms_mmmu(text, options) if options else json.dumps(open_answers.claims(text), ensure_ascii=False)


def _vlmevalkit_mmmu(text: str, options: Options, target: str) -> str:
    """An open question becomes a choice between the gold and "Other Answers", as in its `MMMU_preproc`."""
    if options:
        return letters.vlmevalkit(text, options)
    gold = several(target)[0]
    return gold if letters.vlmevalkit(text, {"A": gold, "B": "Other Answers"}) == "A" else ""


def _grace_mmmu(text: str, options: Options, target: str) -> str:
    return letters.grace_first(text, options) if options else text


def _of_text(reader: Callable[[str], str]) -> Callable[[str, Options, str], str]:
    return lambda text, options, target: reader(text)


def _of_options(reader: Callable[[str, Options], str]) -> Callable[[str, Options, str], str]:
    return lambda text, options, target: reader(text, options)


EXTRACTIONS: dict[str, Callable[[str, Options, str], str]] = {
    "whole": _of_text(str.strip),
    "lower": _of_text(lambda text: text.strip().lower()),
    "without_stop": _of_text(lambda text: text.rstrip(".").lower()),
    "yes_no": _of_text(yes_no.either),
    "letter": _of_options(letters.leading),
    "yes_no_lmms": _of_text(yes_no.lower),
    "yes_no_mme": _of_text(yes_no.leading),
    "yes_no_vlmevalkit": _of_text(yes_no.vlmevalkit),
    "yes_no_llava": _of_text(yes_no.llava_pope),
    "yes_no_grace": _of_text(yes_no.grace),
    "letter_lmms_scienceqa": _of_options(letters.lmms_scienceqa),
    "letter_lmms_ai2d": _of_options(letters.lmms_ai2d),
    "letter_lmms_seed": _of_options(letters.lmms_seed),
    "letter_lmms_mmstar": _of_options(letters.lmms_mmstar),
    "letter_lmms_mmbench": _of_options(letters.lmms_mmbench),
    "letter_vlmevalkit": _of_options(letters.vlmevalkit),
    "letter_llava_scienceqa": _of_options(letters.llava_scienceqa),
    "letter_grace_first": _of_options(letters.grace_first),
    "letter_grace_last": _of_options(letters.grace_last),
    "mmmu_lmms": _lmms_mmmu,
    "mmmu_vlmevalkit": _vlmevalkit_mmmu,
    "mmmu_grace": _grace_mmmu,
    "vqa_challenge": _of_text(vqa.challenge),
    "vqa_evalai": _of_text(vqa.evalai),
    "vqa_vlmevalkit": _of_text(vqa.vlmevalkit),
}
"""(answer, options by letter, target) -> what is compared with the target."""


def extract(name: str, text: str, options: Mapping[str, str] | None = None, target: str = "") -> str:
    """What an extraction takes from an answer."""
    return EXTRACTIONS[name](text, options or {}, target)
