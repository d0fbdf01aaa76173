"""Small data sets of a user's own, and what `prepare` makes of them."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from grace.config.sections import FilesData
from grace.data.prepare import prepare_files


def image_bytes(colour="red", size=(40, 30), format="JPEG", mode="RGB", **save) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format, **save)
    return buffer.getvalue()


def dialogue(*values, keys=("from", "value"), roles=("human", "gpt")):
    """Values in turn, from the user first."""
    return [{keys[0]: roles[i % 2], keys[1]: value} for i, value in enumerate(values)]


def llava(id="one", image="a.jpg", said=("<image>\nwhat colour is it", "red"), **more):
    """A record of LLaVA's kind; without an image where `image` is None."""
    return {"id": id, "conversations": dialogue(*said), **({} if image is None else {"image": image}), **more}


def write_source(folder: Path, records, name="conversations.json") -> Path:
    """A JSON file, and beside it the folder `images` with a.jpg (red) and sub/b.png (blue)."""
    (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "a.jpg").write_bytes(image_bytes("red"))
    (folder / "images" / "sub" / "b.png").write_bytes(image_bytes("blue", format="PNG"))
    (folder / name).write_text(records if isinstance(records, str) else json.dumps(records))
    return folder / name


def prepare(folder: Path, processor: Path, source=None, workers=1, name="data", **data) -> Path:
    """Run `prepare` on `folder`/conversations.json, or on `source` (one or a list of sections)."""
    source = source or {"path": str(folder / "conversations.json"), "images": str(folder / "images")}
    sources = source if isinstance(source, list) else [source]
    section = FilesData.model_validate({"source": "files", "sources": sources, "max_bad": 0.9, **data})
    prepare_files(section, processor, None, folder / name, folder / f"{name}-parts", workers)
    return folder / name


def rows(data: Path) -> dict[str, dict]:
    """The rows of `train.parquet` by id."""
    return {row["id"]: row for row in pq.read_table(data / "train.parquet").to_pylist()}


def report(data: Path) -> dict:
    return json.loads((data / "report.json").read_text())
