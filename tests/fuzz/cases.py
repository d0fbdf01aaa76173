"""Numbered cases until the time is over; every kind of failure is told once, with the case that shows it again."""

import argparse
import contextlib
import io
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grace.errors import GraceError


def flags(text: str) -> argparse.ArgumentParser:
    """What every fuzzer of numbered cases is told."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=sys.maxsize)
    return parser


def run(arguments: argparse.Namespace, failures: Callable[[int], dict[str, str]]) -> int:
    """Go through the cases; the exit status.

    Args:
        failures: of the case of a number, every kind of failure with where it was found.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    kinds, number = set(), arguments.first
    end = time.monotonic() + arguments.seconds
    while number < arguments.first + arguments.cases and time.monotonic() < end:
        for kind, where in failures(number).items():
            if kind not in kinds:
                kinds.add(kind)
                print(f"case {number}: {kind} ({where})", flush=True)
        number += 1
    print(f"cases {arguments.first} to {number - 1}: {len(kinds)} kinds of failure")
    return int(bool(kinds))


def failure(read: Callable[[], Any], one_line: bool = False) -> str | None:
    """What is wrong with how a reader answers: nothing, a text too long for a sentence, an exception and its place."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read()
    except GraceError as error:
        said = str(error)
        return f"a sentence of {len(said)} letters" if len(said) > 3000 or (one_line and "\n" in said) else None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a package in Rust is no Exception
        frames = traceback.extract_tb(error.__traceback__)
        place = [frame for frame in frames if "/grace/" in frame.filename] or frames
        return f"{type(error).__name__} at {'/'.join(Path(place[-1].filename).parts[-2:])}:{place[-1].lineno}"
    return None
