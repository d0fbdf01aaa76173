"""A question's score in 0..1 from what was extracted and the target alone, under each protocol's rule.

A predictions file keeps both, so that every score can be made again from it. Sources: as in `letters`, `vqa` and
`open_answers`; OCRBench: lmms-eval 0.7.3 `tasks/ocrbench/utils.py`, VLMEvalKit e8e78f05 `vlmeval/dataset/image_vqa.py`,
GRACE b73fa9b `evaluation/OCRBench/eval_ocrbench.py`.
"""

import json
import re
import string
from collections.abc import Callable, Sequence

from grace.benchmarks import open_answers, vqa
from grace.benchmarks.extraction import normalise, several

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_HALF_WIDTH = {0x3000: " "} | {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}
FORMULAS = (
    "Handwritten Mathematical Expression Recognition",
    "HME100k",
)  # OCRBench's group in which blanks don't count

Score = Callable[[str, str, str], float]


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, agreements among the other annotators / 3) (Antol et al. 2015).

    Both sides must be normalised alike. With ten annotators, three agreements with the answer give 0.9, four give 1.
    """
    agreements = sum(other == answer for other in answers)
    return sum(min(1.0, (agreements - (own == answer)) / 3) for own in answers) / len(answers)


def _vqa(normal: Callable[[str], str]) -> Score:
    return lambda said, target, group: vqa_accuracy(said, [normal(each) for each in several(target)])


def _trimmed(said: str, target: str, group: str) -> float:
    return float(any(each.strip().lower() == said.strip().lower() for each in several(target)))


def _exact_match(said: str, target: str, group: str) -> float:
    """`exact_match` of the harnesses with `ignore_case` and `ignore_punctuation`; blanks count."""
    return float(said.lower().translate(_PUNCTUATION) == target.lower().translate(_PUNCTUATION))


def _contains_lmms(said: str, target: str, group: str) -> float:
    def plain(text: str) -> str:
        text = text if group in FORMULAS else text.translate(_HALF_WIDTH).lower()
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if group in FORMULAS else text

    return float(any(plain(each) in plain(said) for each in several(target)))


def _contains_vlmevalkit(said: str, target: str, group: str) -> float:
    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if group in FORMULAS else text.lower()

    return float(any(plain(each) in plain(said) for each in several(target)))


def _contains_grace(said: str, target: str, group: str) -> float:
    if group in FORMULAS:
        plain = re.sub(r"\s+", "", said.strip())
        return float(bool(plain) and any(re.sub(r"\s+", "", each.strip()) == plain for each in several(target)))
    plain = re.sub(r"\s+", " ", said.lower().strip())
    golds = [re.sub(r"\s+", " ", each.lower().strip()) for each in several(target)]
    return float(bool(plain) and any(gold and gold in plain for gold in golds))


def _mmmu_lmms(said: str, target: str, group: str) -> float:
    if not target.startswith("["):
        return float(said == target)
    return float(open_answers.holds(json.loads(said), several(target)))


def _mmmu_grace(said: str, target: str, group: str) -> float:
    """A gold of several answers is a list literal there, which no answer equals."""
    if not target.startswith("["):
        return float(said == target)
    golds = several(target)
    return float(open_answers.grace_open(said, golds[0] if len(golds) == 1 else str(golds)))


SCORES: dict[str, Score] = {
    "normalised": lambda said, target, group: float(normalise(said) == normalise(target)),
    "same": lambda said, target, group: float(said == target),
    "trimmed": _trimmed,
    "exact_match": _exact_match,
    "vqa_challenge": _vqa(vqa.challenge),
    "vqa_evalai": _vqa(vqa.evalai),
    "vqa_vlmevalkit": _vqa(vqa.vlmevalkit),
    "contains_lmms": _contains_lmms,
    "contains_vlmevalkit": _contains_vlmevalkit,
    "contains_grace": _contains_grace,
    "mmmu_lmms": _mmmu_lmms,
    "mmmu_vlmevalkit": lambda said, target, group: float(said == several(target)[0]),
    "mmmu_grace": _mmmu_grace,
}
"""(extracted, target, group) -> score; `group` matters to OCRBench's formulas alone."""
