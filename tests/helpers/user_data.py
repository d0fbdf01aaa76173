"""A user's data folder in small: a mix in LLaVA's form with its images, and official-format benchmarks."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from official_rows import OFFICIAL
from PIL import Image

ANSWERS = ["red", "blue", "green", "black"]


def image(seed: int, size: tuple[int, int] = (72, 56)) -> bytes:
    """A PNG of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def write_benchmarks(folder: Path, names: list[str], count: int, tsv: tuple[str, ...] = ()) -> None:
    """`folder/{name}.parquet`, or .tsv for the names in `tsv`, of `count` rows each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        rows = [OFFICIAL[name](number) for number in range(count)]
        if name in tsv:
            cells = [{**row, "image": base64.b64encode(row["image"]["bytes"]).decode()} for row in rows]
            pd.DataFrame(cells).to_csv(folder / f"{name}.tsv", sep="\t", index=False)
        else:
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")


def write_conversations(folder: Path, file: Path, count: int) -> None:
    """A mix in LLaVA's form with images below `folder`: one or several turns, and every fourth of text alone."""
    (folder / "coco/train2017").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for n in range(count):
        said = ["What color is it?", ANSWERS[n % 4]] + (["Is it a shirt?", "No, it is a boot."] if n % 3 else [])
        record: dict[str, Any] = {"id": f"{n:09d}"}
        if n % 4 != 3:
            name = f"coco/train2017/{n:012d}.jpg"
            Image.open(io.BytesIO(image(n, (64 + n % 5 * 8, 56)))).convert("RGB").save(folder / name)
            record["image"] = name
            said[0] = f"<image>\n{said[0]}" if n % 2 else f"{said[0]}\n<image>"
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
        records.append({**record, "conversations": turns})
    file.write_text(json.dumps(records))
