"""Yes or no, as each protocol reads it; "" or a word that is neither where it cannot be read, which is never right.

Sources: lmms-eval 0.7.3 `tasks/{pope,mme}/utils.py`; VLMEvalKit e8e78f05 `vlmeval/dataset/utils/yorn.py`; LLaVA c121f04
`llava/eval/eval_pope.py`; GRACE b73fa9b `evaluation/HallusionBench/eval_hallusion.py`.
"""

import re

from grace.benchmarks.vqa import strip_punctuation

_AFFIRMING = frozenset(["yes", "true", "correct", "right", "is", "are", "does", "can"])
_DENYING = frozenset(["no", "not", "false", "incorrect", "wrong", "cannot", "isn't", "aren't", "doesn't", "don't"])


def either(text: str) -> str:
    """`yes` or `no` where exactly one of the two words is said."""
    said = set(re.findall(r"\b(yes|no)\b", text.lower()))
    return said.pop() if len(said) == 1 else ""


def lower(text: str) -> str:
    """lmms-eval's POPE: the whole answer in lower case, so that "Yes." is neither."""
    return text.lower().strip()


def leading(text: str) -> str:
    """MME's own reader: yes or no within the first four characters, full stops removed; `y` and `n` alone count."""
    said = text.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "other")
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


def vlmevalkit(text: str) -> str:
    """`yes` or `no` where exactly one is a word of the answer, under its punctuation rule."""
    words = strip_punctuation(text.lower(), lookbehind=True).split()
    said = [word for word in ("yes", "no") if word in words]
    return said[0] if len(said) == 1 else "unknown"


def llava_pope(text: str) -> str:
    """No where the first sentence has the word "No", "no" or "not"; else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def grace(text: str) -> str:
    """The first word of two lists decides ("The answer is no" -> yes, because `is` affirms)."""
    for word in re.findall(r"\b([a-z']+)\b", text.lower()):
        if word in _AFFIRMING:
            return "yes"
        if word in _DENYING:
            return "no"
    return ""
