"""Conversation files and images broken at random: `prepare` ends well or with one sentence, never with a traceback.

    python tests/fuzz/conversations.py --seconds 600

Every case follows from its number, so that `--first N --cases 1` shows it again.
"""

import argparse
import base64
import io
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from grace.config.sections import FilesData
from grace.data.decode import Unreadable, decode, read_header
from grace.data.prepare import prepare_files
from grace.data.sources import BadRecord, understand
from grace.demo.processor import build_processor
from grace.errors import GraceError

VALUES: list[Any] = [
    None, True, 0, -1, 3.5, 10**400, float("nan"), float("inf"), "", " ", "\n", "x" * 5000, "\ud800", "\0", "\u202e",
    [], {}, [[]], [None], {"a": 1}, [1, "x"], "<image>", "<image>" * 20, "</s><|im_end|><eos><bos>",
    "{{ 7*7 }}{% for %}",
    "../../etc/passwd", "/etc/passwd", "a.jpg", "sub\\b.png", "http://x/a.jpg", "data:image/png;base64,AAAA", "data:,",
    "human", "gpt", "system", "tool", {"bytes": None, "path": None}, {"type": "image"}, {"type": "text"},
    {"type": "image_url", "image_url": {"url": None}}, [{"type": "text", "text": "x"}], {"from": "human", "value": "x"},
]  # fmt: skip
KEYS = ("id", "image", "images", "conversations", "messages", "texts", "from", "value", "role", "content", "type", "é")


def images() -> dict[str, bytes]:
    """One small image of every format and of the unusual modes."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 31, 3), np.uint8)
    base = Image.fromarray(noise)
    made = {}
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        made[format] = base, {}
    exif = Image.Exif()
    exif[0x0112] = 6
    made["turned"] = base, {"format": "JPEG", "exif": exif}
    made["progressive"] = base, {"format": "JPEG", "progressive": True}
    made["cmyk"] = base.convert("CMYK"), {"format": "JPEG"}
    made["palette"] = base.quantize(16), {"format": "PNG", "transparency": 3}
    made["rgba"] = base.convert("RGBA"), {"format": "PNG"}
    made["grey16"] = Image.fromarray(noise[..., 0].astype(np.uint16) * 257), {"format": "PNG"}
    made["float"] = Image.fromarray(noise[..., 0].astype(np.float32)), {"format": "TIFF"}
    made["animated"] = base, {"format": "GIF", "save_all": True, "append_images": [base.rotate(90)] * 2}
    made["apng"] = base, {"format": "PNG", "save_all": True, "append_images": [base.rotate(90)] * 2}
    made["lzw"] = base, {"format": "TIFF", "compression": "tiff_lzw"}
    found = {}
    for name, (image, save) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, **({"format": name} | save))
        found[name] = buffer.getvalue()
    return found


ENCODED = images()


def broken_bytes(draw: random.Random, data: bytes) -> bytes:
    """`data` with a few bytes flipped, cut, doubled or put in."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.choice([0, 255, 0x7F, draw.randrange(256)])
        elif kind == 2:
            del data[at : at + draw.choice([1, 4, 100, len(data)])]
        elif kind == 3:
            data[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice([1, 4, 50])))
        else:
            data[at:at] = data[at : at + draw.randrange(1, 60)]
    return bytes(data)


def broken_value(draw: random.Random, value: Any) -> Any:
    """A JSON value with one node, somewhere inside, changed."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        value, key = dict(value), draw.choice(list(value))
        kind = draw.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[draw.choice(KEYS)] = value.pop(key)
        elif kind == 2:
            value[draw.choice(KEYS)] = draw.choice(VALUES)
        else:
            value[key] = broken_value(draw, value[key])
        return value
    if isinstance(value, list) and value and draw.random() < 0.85:
        value, at = list(value), draw.randrange(len(value))
        kind = draw.randrange(8)
        if kind == 0:
            del value[at]
        elif kind == 1:
            value.insert(at, draw.choice(VALUES))
        elif kind == 2:
            draw.shuffle(value)
        elif kind == 3:
            value.insert(at, value[draw.randrange(len(value))])
        else:
            value[at] = broken_value(draw, value[at])
        return value
    return draw.choice(VALUES)


def records(draw: random.Random) -> list[dict]:
    """Sound records of every kind."""
    said = [{"from": "human", "value": "<image>\nwhat colour is it"}, {"from": "gpt", "value": "red"}]
    parts = [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": "a.jpg"}}]
    url = "data:image/png;base64," + base64.b64encode(ENCODED["PNG"]).decode()
    kinds = [
        {"id": "a", "image": "a.jpg", "conversations": said * draw.choice([1, 1, 1, 2])},
        {"id": 1, "conversations": [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "red"}]},
        {"image": ["a.jpg", "broken.jpg"], "conversations": [{"from": "system", "value": "brief"}, *said, *said]},
        {"id": "o", "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]},
        {"id": "u", "image": url, "messages": [{"role": "user", "content": "what"},
            {"role": "assistant", "content": "red"}]},
        {"images": ["broken.jpg"], "texts": [{"user": "what colour is it", "assistant": "red"}]},
    ]  # fmt: skip
    return [draw.choice(kinds) for _ in range(draw.choice([1, 3, 5]))]


def write_case(draw: random.Random, folder: Path) -> Path:
    """A broken source and image in `folder`; return the source."""
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "broken.jpg").write_bytes(broken_bytes(draw, draw.choice(list(ENCODED.values()))))
    value: Any = records(draw)
    for _ in range(draw.choice([0, 1, 1, 2, 4])):
        value = broken_value(draw, value)
    kind = draw.choice(["json", "json", "jsonl", "parquet"])
    path = folder / f"source.{kind}"
    if kind == "parquet":
        try:
            pq.write_table(pa.Table.from_pylist(value), path)
        except Exception:  # not every broken value has an Arrow type
            path = folder / "source.json"
    if path.suffix == ".json":
        path.write_text(json.dumps(value, indent=draw.choice([None, 2])))
    elif path.suffix == ".jsonl":
        lines = value if isinstance(value, list) else [value]
        path.write_text("\n".join(json.dumps(line) for line in lines))
    if draw.random() < 0.3:
        path.write_bytes(broken_bytes(draw, path.read_bytes()))
    if draw.random() < 0.02:
        path.write_text("[" * draw.choice([500, 5000, 200_000]))
    return path


def one_image(data: bytes) -> None:
    """Decode an image that may be damaged."""
    try:
        shown, header = decode(data, max_pixels=10**7)
        assert shown.mode == "RGB" and shown.size == (header.width, header.height) and read_header(data) == header
    except Unreadable as refused:
        assert refused.reason and "\n" not in str(refused)


def one_record(record: Any) -> None:
    """Read a record that may be malformed."""
    try:
        said = understand(record)
        places = sum(part.type == "image" for message in said.messages for part in message.content)
        assert places == len(said.images) and said.messages[-1].role == "assistant"
        json.dumps([[p.text for p in m.content] for m in said.messages], ensure_ascii=False).encode()
    except BadRecord as bad:
        assert bad.reason and "\n" not in bad.reason


def check(number: int, processor: Path) -> str:
    """Run one case; return how it ended. Anything but a result or one sentence is an exception."""
    draw = random.Random(number)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "images" / "a.jpg").write_bytes(ENCODED["JPEG"])
        path = write_case(draw, folder)
        for _ in range(20):
            one_image(broken_bytes(draw, draw.choice(list(ENCODED.values()))))
            one_record(broken_value(draw, broken_value(draw, draw.choice(records(draw)))))
        source = {"path": str(path), "images": str(folder / "images")}
        bad = draw.choice([0.0, 0.5, 1.0])
        data = FilesData.model_validate({"source": "files", "sources": [source], "max_bad": bad, "max_length": 100})
        try:
            with redirect_stdout(io.StringIO()):
                prepare_files(data, processor, None, folder / "data", folder / "parts")
        except GraceError as error:
            assert "\n" not in str(error), "more than one line"
            return "sentence"
        assert (folder / "data" / "train.parquet").exists()
        return "result"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=sys.maxsize)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's, on damaged tags
    ends, start, number = Counter(), time.monotonic(), arguments.first
    with tempfile.TemporaryDirectory() as processor:
        build_processor().save_pretrained(processor)
        while number < arguments.first + arguments.cases and time.monotonic() - start < arguments.seconds:
            try:
                ends[check(number, Path(processor))] += 1
            except Exception as error:
                ends[type(error).__name__] += 1
                print(f"case {number}: {traceback.format_exc(limit=-2)}", file=sys.stderr)
            number += 1
    print(f"cases {arguments.first} to {number - 1}: {dict(ends)}")
    return int(set(ends) - {"result", "sentence"} != set())


if __name__ == "__main__":
    sys.exit(main())
