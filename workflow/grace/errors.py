"""The one exception that a user is meant to read, and what other packages raise as parts of its sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

_LONG = re.compile(r"(\S{180})\S{120,}(\S{100})")


class GraceError(Exception):
    """Something the user can fix: one sentence that names the file, the field and the fix.

    The command line prints the sentence alone and exits with status 1; any other exception is a bug and keeps its
    traceback. A word of 400 letters or more is something that a file says, and stands with its beginning and its end.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(shortened(sentence))


def shortened(sentence: str) -> str:
    """A sentence whose words have at most 281 letters each where they had 400 or more."""
    return _LONG.sub(r"\1…\2", sentence)


def reason(error: BaseException) -> str:
    """What another package's exception says, as part of a sentence: its first line,
    or its kind where it says nothing.
    """
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def problem(error: ValidationError) -> str:
    """What pydantic found first, as part of a sentence: the key, and what its value has to be."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(printable(str(part), 60) for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    said = said[0].lower() + said[1:]
    return f"`{where}`: {said}" if where else said


def printable(text: str, longest: int = 200) -> str:
    """Text of others in one line of a sentence: what no terminal should act upon is spelt out, and its end left out."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:longest])
    return shown + "…" * (len(text) > longest)


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """A panic of a package in Rust as a RuntimeError: pyo3's own kind passes every `except Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # made anew by each package, and importable from none
            raise
        raise RuntimeError(str(error)) from error
