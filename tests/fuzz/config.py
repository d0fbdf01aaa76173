"""Broken configurations: every one is read, or refused in sentences, within seconds.

    python tests/fuzz/config.py --seconds 3600 --seed 1

Each round changes a good file: bytes, lines, tokens of YAML, or values and keys in place. What comes through is planned
as well. The first input of each new kind of failure is kept in --keep.
"""

import argparse
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from stub_tree import CONFIG

from grace.config.frozen import Frozen
from grace.config.load import load_experiment
from grace.config.plan import Plan
from grace.errors import GraceError

LONGEST_S = 20  # for one file, on a busy machine

ODD = [
    None, True, "", " ", "nan", ".nan", ".inf", "-.inf", "1e400", "1e3", 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5,
    1e308, float("nan"), float("inf"), "a" * 300, "a+b", "a-b", "a_b", "../x", "/", "a\nb", "\x07", "é", "🙂", "{x}",
    "{{",
    "$(touch x)", "`id`", "*", "(?!)", "2020-13-45", "0x", "!!", [], {}, [[]], [None], {"a": {}}, ["a"] * 50, "on", "~",
]  # fmt: skip
TOKENS = [
    "&a ", "*a", "<<: ", "- ", "? ", ": ", "[", "]", "{", "}", "!!int ", "!!binary ", "!!timestamp ", "!!python/none ",
    "|\n",
    ">\n", "---\n", "...\n", "%YAML 9.9\n", "#", "'", '"', "\t", "\0", "\ufeff", "\u2028", "@", "`", "&a [*a]",
    "!!set {a}",
    "0o9", "1_0", "2020-13-45", "1:61:1", "9" * 5000, "[" * 2000, "{a: " * 500, "!<tag:x> ",
]  # fmt: skip


class Slow(BaseException):
    """A file took longer than `LONGEST_S`."""


def broken(random_: random.Random) -> bytes:
    """A configuration with one to four things wrong."""
    values = yaml.safe_load(CONFIG)
    text = None
    for _ in range(random_.randint(1, 4)):
        way = random_.randrange(5)
        if way < 2 and text is None:
            _change(values, random_)
            continue
        text = text if text is not None else yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        text = [_lines, _tokens, _letters][way % 3](text, random_)
    text = text if text is not None else yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if random_.random() < 0.1 and data:
        for _ in range(random_.randint(1, 5)):
            data[random_.randrange(len(data))] = random_.randrange(256)
    return bytes(data)


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index)."""
    keys = list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    for key in keys:
        yield values, key
        yield from _places(values[key])


def _change(values: Any, random_: random.Random) -> None:
    """A value replaced, a key renamed, removed, added or moved."""
    places = list(_places(values))
    if not places:
        return
    container, key = random_.choice(places)
    way = random_.randrange(5)
    if way == 0:
        container[key] = deepcopy(random_.choice(ODD))
    elif way == 1 and isinstance(container, dict):
        name = random_.choice([odd for odd in ODD if not isinstance(odd, (list, dict))])
        container[name] = container.pop(key)
    elif way == 2:
        del container[key]
    elif way == 3 and isinstance(container, dict):
        container[random_.choice(["x", "baseline", "data", "a+b", "a" * 65])] = deepcopy(random_.choice(ODD))
    else:
        other, name = random_.choice(places)
        there = name in other if isinstance(other, dict) else name < len(other)
        container[key] = deepcopy(other[name]) if there else None  # a copy: nothing may end up inside itself


def _lines(text: str, random_: random.Random) -> str:
    """Lines cut, doubled, moved in or out."""
    lines = text.splitlines(keepends=True)
    at = random_.randrange(len(lines)) if lines else 0
    way = random_.randrange(4)
    if way == 0:
        return "".join(lines[:at] + lines[at + 1 :])
    if way == 1:
        return "".join(lines[: at + 1] + lines[at:])
    if way == 2:
        return "".join([*lines[:at], *(f"  {line}" for line in lines[at : at + 3]), *lines[at + 3 :]])
    random_.shuffle(lines)
    return "".join(lines)


def _tokens(text: str, random_: random.Random) -> str:
    at = random_.randrange(len(text) + 1)
    return text[:at] + random_.choice(TOKENS) + text[at + random_.choice([0, 0, 1, 20]) :]


def _letters(text: str, random_: random.Random) -> str:
    letters = list(text)
    for _ in range(random_.randint(1, 6)):
        if letters:
            letters[random_.randrange(len(letters))] = chr(
                random_.choice([32, 9, 10, 58, 45, 35, 123, 0, 233, 0x1F642])
            )
    return "".join(letters)


def read(path: Path) -> str:
    """What becomes of a file: `read`, or the first sentence of its refusal; any other exception comes through."""
    try:
        experiment = load_experiment(path)
        plan = Plan(experiment)
        for job in ("experiment", "data", "teacher", "cache", "evaluation", "bench"):
            if job != "teacher" or experiment.teacher.train:
                Frozen(plan).job(job)
        assert len(plan.predictions) == len(set(plan.predictions)) == 1 + len(experiment.students())
        return "read"
    except GraceError as error:
        said = str(error)
        assert said and all(line.startswith(str(path)) for line in said.splitlines()), said
        assert all(len(line) < 1000 for line in said.splitlines()), said
        return said


def failure(data: bytes, folder: Path) -> str | None:
    """What is wrong with how a file is answered: the exception and where it was raised; None where nothing is."""

    def stop(*_: Any) -> None:
        raise Slow

    path = folder / "config.yaml"
    path.write_bytes(data)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_S)
    try:
        read(path)
        return None
    except (Exception, Slow) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}-{Path(place.filename).stem}-{place.lineno}"
    finally:
        signal.alarm(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None, help="folder for the first input of each kind of failure")
    arguments = parser.parse_args()
    random_, found, files = random.Random(arguments.seed), {}, 0
    end = time.monotonic() + arguments.seconds
    with TemporaryDirectory() as folder:
        while time.monotonic() < end:
            data = broken(random_)
            files += 1
            kind = failure(data, Path(folder))
            if kind and kind not in found:
                found[kind] = data
                print(f"{files}: {kind}", flush=True)
                if arguments.keep:
                    arguments.keep.mkdir(parents=True, exist_ok=True)
                    (arguments.keep / f"{kind}.yaml").write_bytes(data)
    print(f"{files} files, {len(found)} kinds of failure")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
