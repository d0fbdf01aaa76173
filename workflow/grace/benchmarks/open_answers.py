"""MMMU's open questions: what an answer claims, and whether it holds the gold.

Sources: MMMU's evaluation as restated by lmms-eval 0.7.3 `tasks/mmmu/utils.py`; GRACE b73fa9b
`evaluation/mmmu/eval_mmmu.py`.
"""

import re
import string

_SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

Claim = str | float


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _normal(text: str) -> list[Claim]:
    """A number rounded to two places; a lone character with a blank before and one behind,
    so that words don't match.
    """
    text = text.strip()
    number = _number(text)
    if number is not None:
        return [round(number, 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def claims(text: str) -> list[Claim]:
    """What an answer may mean: the shortest tail of each sentence behind a word that announces one, and its numbers."""
    said = text.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", said)
    tails = []
    for place, part in enumerate(parts):
        signs = (*_SIGNS, "=") if place == len(parts) - 1 else _SIGNS
        found = [part.split(sign)[-1].strip() for sign in signs if sign in part]
        shortest = ""
        for tail in found:  # an empty tail gives way to any other, as in MMMU's code
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            tails.append(shortest)
    tails = tails or [said]
    numbers = [number for tail in tails for form in _NUMBERS for number in re.findall(form, tail)]
    return sorted({claim for each in (*tails, *numbers) for claim in _normal(each)}, key=str)


def holds(made: list[Claim], golds: list[str]) -> bool:
    """Whether a claim in words contains a gold in words, or a number is a gold number."""
    wanted = [claim for gold in golds for claim in _normal(gold)]
    words = [gold for gold in wanted if isinstance(gold, str)]
    return any(any(gold in claim for gold in words) if isinstance(claim, str) else claim in wanted for claim in made)


def grace_open(text: str, gold: str) -> bool:
    """The first number within 1e-4 of a gold number; else equal without case and punctuation,
    or gold is one word of it.
    """

    def bare(value: str) -> str:
        return " ".join(value.lower().strip().translate(_NO_PUNCTUATION).split())

    said, want = text.strip(), _number(gold.strip().replace(",", "").rstrip("."))
    if not said or not gold:
        return False
    found = re.search(r"-?\d+(?:\.\d+)?", said)
    if want is not None and found and abs(float(found.group()) - want) < 1e-4:
        return True
    return bool(bare(gold)) and (bare(gold) == bare(said) or bare(gold) in bare(said).split())
