"""Peak memory of asking a large benchmark, without a model.

    python tests/benchmarks/evaluate_memory.py {grace|lmms-eval} ROWS [WIDTH]

Rows are VQAv2's with a JPEG each, WIDTH x 3/4 WIDTH pixels (640: about 100 kB); a stand-in answers at once, so that
what is measured is reading, rendering, holding and scoring.
"""

import io
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from grace.benchmarks.extraction import Answer
from grace.benchmarks.protocols import spec
from grace.benchmarks.registry import benchmark

HARNESS, ROWS = sys.argv[1], int(sys.argv[2])
WIDTH = int(sys.argv[3]) if len(sys.argv) > 3 else 640


class Silent:
    """Answers everything at once."""

    def __init__(self) -> None:
        self.known: dict = {}

    def render(self, messages) -> str:
        return str(messages)

    def answer(self, questions, advance) -> list[Answer]:
        return [Answer("red", 0.0, 0.0)] * len(questions)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path, pixels = Path(folder) / "vqav2.parquet", np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        kept = io.BytesIO()
        Image.fromarray(pixels).resize((WIDTH, WIDTH * 3 // 4)).save(kept, "JPEG", quality=90)
        answers = [{"answer": "red", "answer_id": i} for i in range(10)]
        with pq.ParquetWriter(path, pa.Table.from_pylist([
            {"question_id": 0, "question": "what", "answers": answers, "image": {"bytes": b"", "path": ""}}
        ]).schema) as writer:  # fmt: skip
            for start in range(0, ROWS, 500):
                part = [
                    {"question_id": i, "question": "what", "answers": answers,
                     "image": {"bytes": kept.getvalue() + i.to_bytes(8, "big"), "path": "x"}}
                    for i in range(start, min(start + 500, ROWS))
                ]  # fmt: skip
                writer.write_table(pa.Table.from_pylist(part))
        print(f"{ROWS} rows, {path.stat().st_size / 2**20:.0f} MiB, image {len(kept.getvalue())} bytes")
        settings = SimpleNamespace(limit=None, longest=lambda name: None)
        how = replace(spec("lmms-eval", "vqav2"), size=ROWS)
        if HARNESS == "grace":
            from grace.evaluate.ask import predictor
        else:
            from grace.evaluate.harness_lmms_eval import predictor
        before, start = peak_mib(), time.monotonic()
        rows = predictor(Silent(), settings, lambda n: None)(benchmark("vqav2"), path, how)
        print(
            f"{HARNESS}: {len(rows)} rows in {time.monotonic() - start:.0f} s, "
            f"peak {peak_mib():.0f} MiB (imports {before:.0f})"
        )
