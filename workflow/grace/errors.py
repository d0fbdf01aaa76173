"""The one exception that a user is meant to read."""


class GraceError(Exception):
    """Something the user can fix: one sentence that names the file, the field and the fix.

    The command line prints the sentence alone and exits with status 1; any other exception is a bug and keeps its
    traceback.
    """


def reason(error: BaseException) -> str:
    """What another package's exception says, as part of a sentence: its first line, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def printable(text: str, longest: int = 200) -> str:
    """Text of others in one line of a sentence: what no terminal should act upon is spelt out, and its end left out."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:longest])
    return shown + "…" * (len(text) > longest)
