"""Damaged benchmark tables and language tasks: each is read, refused in a sentence, or refused row by row.

    PYTHONPATH=tests/helpers python tests/fuzz/benchmarks.py --seconds 600 --seed 1

prints every input that raised anything else than a `GraceError`, and fails if there was one.
"""

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from functools import partial
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from official_rows import OFFICIAL

from grace.benchmarks.items import show
from grace.benchmarks.protocols import PROTOCOLS
from grace.benchmarks.registry import benchmark
from grace.errors import GraceError
from grace.evaluate.ask import judged
from grace.evaluate.language_tasks import text_key
from grace.evaluate.rows import read_items
from grace.results.predictions import read_questions

JUNK = [
    None, 0, -1, 2**60, 1.5, float("nan"), True, "", "nan", "\x00", "[", "['a'", "['a', 1]", "{}", "A" * 3000,
    "<image 9>", "<image>",
    "￼", b"", b"\xff\xfe", [], [None], ["a"], [1], [["a"]], [{}], {"bytes": None, "path": None},
    {"bytes": b"x", "path": "y"},
    {"answer": "red"}, [{"answer": None}], "1_000_000", "9" * 400,
]  # fmt: skip
TASK = (
    'task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: {test: "text.jsonl"}\noutput_type: loglikelihood\n'
)
SAID = ("A", "B.", "yes", "", "The answer is (C)", "3.5", "red bag", "\x00")


def damaged_table(rng: random.Random, path: Path) -> str:
    """Write a damaged copy of a benchmark to `path`; its name."""
    name = rng.choice(list(OFFICIAL))
    rows = [OFFICIAL[name](i) for i in range(4)]
    for _ in range(rng.randint(1, 3)):
        column, kind = rng.choice(list(rows[0])), rng.randrange(4)
        for row in rows:
            if kind == 0:
                row.pop(column, None)
            elif kind == 1:
                row[rng.choice(["id", "index", "answer", "image", "A", "B", "split"])] = rng.choice(
                    [row.get(column), "x"]
                )
            else:
                row[column] = JUNK[0] if rng.random() < 0.2 else row.get(column)
        if kind == 2:
            value = rng.choice(JUNK)
            rows = [{**row, column: value} for row in rows]
        elif kind == 3:
            rows[rng.randrange(4)][column] = rng.choice(JUNK)
        if not rows[0]:
            rows = [OFFICIAL[name](0)]
    try:
        pq.write_table(pa.Table.from_pylist(rows), path)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):  # columns of two types: no table at all
        path.write_bytes(b"PAR1" + rng.randbytes(rng.randrange(60)))
    if rng.random() < 0.1:
        whole = path.read_bytes()
        path.write_bytes(whole[: rng.randrange(len(whole))])
    return name


def damaged_task(rng: random.Random, path: Path) -> None:
    """Write a damaged language task to `path`."""
    content = bytearray(TASK.encode())
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(content))
        if rng.random() < 0.5:
            content[place : place + rng.randrange(12)] = rng.choice(
                [b"[", b"{", b": ", b"\x80", b"&a *a", b"- ", b"1", b"\t", b"!x"]
            )
        else:
            content[place] = rng.randrange(256)
    path.write_bytes(bytes(content))


def survive(rounds: Iterable[int], seed: int) -> list[str]:
    """Damage and read; the tracebacks of whatever was no `GraceError`."""
    rng, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        for number in rounds:
            table, task = Path(folder) / f"{number}.parquet", Path(folder) / "task.yaml"
            name = damaged_table(rng, table)
            damaged_task(rng, task)
            asked = [specs[name] for specs in PROTOCOLS.values() if name in specs]
            acts = [partial(_read, table, name, how) for how in asked]
            for act in (*acts, partial(read_questions, table), partial(text_key, "model", str(task), None, {})):
                try:
                    act()
                except GraceError:
                    pass
                except Exception:
                    found.append(f"round {number}, {name}:\n{traceback.format_exc()}")
            table.unlink()
    return found


def _read(path: Path, name: str, how) -> None:
    for _, item in read_items(path, benchmark(name), how, limit=100):
        if isinstance(item, str):
            continue
        try:
            show(how.prompt, how.placing, item)
        except ValueError:
            continue
        for text in SAID:
            judged(how, item, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end, done = time.monotonic() + arguments.seconds, count()
    failures = survive(iter(lambda: next(done) if time.monotonic() < end else None, None), arguments.seed)
    print("\n".join(failures))
    print(f"{next(done)} rounds, {len(failures)} tracebacks")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
