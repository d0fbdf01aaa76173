"""Numbers and texts as people read them."""

import math
import re


def number(value: float | None, digits: int = 1) -> str:
    """A number for people; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero


def p_text(p: float) -> str:
    """A p value for people."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


MARKUP = {"<": "&lt;", "[": "\\[", "$": "\\$"}  # HTML, links and formulas: never meant in a name
_SIGNS = MARKUP | {sign: f"\\{sign}" for sign in "\\`*_|"}


def markdown_text(text: str, signs: dict[str, str] = _SIGNS) -> str:
    """One line of Markdown that shows a text, whatever a label or an answer holds.

    Args:
        signs: how each sign that would be markup is written.
    """
    shown = "".join(signs.get(character, character) for character in " ".join(text.splitlines()))
    return re.sub(r"(?<=[A-Za-z0-9])\\_(?=[A-Za-z0-9])", "_", shown)  # within a word it means itself
