"""An answer, and what of it counts: extraction and normalisation, the same for every harness that leaves it to us."""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LETTER = re.compile(r"^\(?([A-Z])(?:[).:,\s]|$)")
_YES_NO = re.compile(r"\b(yes|no)\b")


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


def whole(text: str) -> str:
    """The whole answer, trimmed."""
    return text.strip()


def yes_no(text: str) -> str:
    """`yes` or `no` where exactly one of the two words is said; else the empty string, which is never right."""
    said = set(_YES_NO.findall(text.lower()))
    return said.pop() if len(said) == 1 else ""


def letter(text: str) -> str:
    """The option's letter that the answer opens with ("B", "B.", "(B) red"); else the empty string.

    A letter further on is not taken: "The answer is B" begins with no option, and "A dog" would be A.
    """
    found = _LETTER.match(text.strip())
    if not found or re.match(r"^A\s+[a-z]", text.strip()):
        return ""
    return found.group(1)


EXTRACTIONS: dict[str, Callable[[str], str]] = {"whole": whole, "yes_no": yes_no, "letter": letter}
"""By the registry's `extraction`."""
