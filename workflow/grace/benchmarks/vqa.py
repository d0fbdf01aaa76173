"""Normalisation of short answers as the VQA challenge does it (Antol et al. 2015), and its two dialects.

Sources: the VQA challenge's evaluation, as restated by lmms-eval 0.7.3 `tasks/_task_utils/vqa_eval_metric.py` and
VLMEvalKit e8e78f05 `vlmeval/smp/misc.py`, `vlmeval/dataset/utils/vqa_eval.py`.
"""

import re

_NUMBERS = dict(zip(
    ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"], strict=True,
))  # fmt: skip
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = [
    "'twas",
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hasn't",
    "haven't",
    "he'd",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'll",
    "ma'am",
    "might've",
    "mightn't",
    "must've",
    "mustn't",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "shan't",
    "should've",
    "shouldn't",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'll",
    "someone's",
    "something'd",
    "something'll",
    "that's",
    "there'd",
    "there're",
    "there's",
    "they'd",
    "they'll",
    "they're",
    "they've",
    "wasn't",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "y'all",
    "you'd",
    "you'll",
    "you're",
    "you've",
]  # written without their apostrophe
_TWICE = [
    "'ow's'at",
    "couldn't've",
    "hadn't've",
    "he'd've",
    "it'd've",
    "mightn't've",
    "she'd've",
    "shouldn't've",
    "somebody'd've",
    "someone'd've",
    "something'd've",
    "there'd've",
    "they'd've",
    "we'd've",
    "who'd've",
    "wouldn't've",
    "y'all'd've",
    "y'all'll",
    "you'd've",
]  # written without one of theirs


def _spelled() -> dict[str, str]:
    """A contraction by its misspellings, as in the challenge's table (and its one slip, somebody'd)."""
    spelled = {right.replace("'", ""): right for right in _CONTRACTIONS}
    for right in _TWICE:
        places = [i for i, character in enumerate(right) if character == "'"]
        spelled |= {right[:i] + right[i + 1 :]: right for i in places}
    return spelled | {"somebody'd": "somebodyd"}


_SPELLED = _spelled()


def strip_punctuation(text: str, lookbehind: bool = False) -> str:
    """Marks go where a blank is beside one or a comma stands between digits, and become blanks otherwise.

    A full stop goes unless a digit follows; with `lookbehind` (VLMEvalKit) also unless a digit is before it.
    """
    thousands = re.search(r"\d,\d", text) is not None
    kept = text
    for mark in _MARKS:
        beside = mark + " " in text or " " + mark in text
        kept = kept.replace(mark, "" if beside or thousands else " ")
    return re.sub(r"(?<!\d)\.(?!\d)" if lookbehind else r"\.(?!\d)", "", kept, count=32)


def plain_words(text: str) -> str:
    """Lower case, numbers as digits, no articles, contractions spelled out."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_SPELLED.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def challenge(text: str) -> str:
    """VQAv2's own."""
    return plain_words(strip_punctuation(_one_line(text)))


def evalai(text: str) -> str:
    """The processor of TextVQA's and VizWiz's servers: commas and question marks go first, and 's stands apart."""
    tokens = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(strip_punctuation(_one_line(tokens)))


def vlmevalkit(text: str) -> str:
    """VLMEvalKit's."""
    return plain_words(strip_punctuation(_one_line(text), lookbehind=True))
