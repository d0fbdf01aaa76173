"""Every word of the demo: what can be in an image, what it is called, and the words that questions are made of."""

COLOURS = {
    "red": (225, 45, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 220, 60),
    "green": (50, 170, 60),
    "cyan": (70, 205, 215),
    "blue": (55, 85, 230),
    "purple": (150, 60, 195),
    "white": (235, 235, 235),
}
"""Name -> the RGB that objects are tinted with, before jitter."""

GARMENTS = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""Fashion-MNIST's ten labels, in its order, one word each."""

CATEGORIES = {
    "topwear": ("tshirt", "pullover", "coat", "shirt"),
    "bottomwear": ("trouser",),
    "dresses": ("dress",),
    "footwear": ("sandal", "sneaker", "boot"),
    "bags": ("bag",),
}
"""The garment trade's own super-categories."""

CATEGORY_OF = {garment: category for category, members in CATEGORIES.items() for garment in members}

DIGITS = tuple("0123456789")

KINDS = GARMENTS + DIGITS
"""What an object can be; an object's `kind` is an index into this."""

POSITIONS = (
    "top-left", "top", "top-right",
    "left", "centre", "right",
    "bottom-left", "bottom", "bottom-right",
)  # fmt: skip
"""The nine cells in reading order; an object's `cell` is an index into this."""

NUMBERS = ("zero", "one", "two", "three", "four", "five")

UNANSWERABLE = "unanswerable"

PHRASES = (
    "describe the picture",
    "blurred",
    "what colour is the",
    "what is",
    "what kind is",
    "which is shown",
    "where is the",
    "is there a",
    "is the",
    "count the",
    "read the digits",
    "or",
    "yes",
    "no",
)
"""Words that questions and answers are made of beside the names above."""

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>", "<q>")


def words() -> list[str]:
    """The whole vocabulary in a fixed order, special tokens first; a word's index is its token id."""
    names = (*COLOURS, *KINDS, *CATEGORIES, *POSITIONS, *NUMBERS, UNANSWERABLE)
    return list(dict.fromkeys([*SPECIAL, *names, *(word for phrase in PHRASES for word in phrase.split())]))
