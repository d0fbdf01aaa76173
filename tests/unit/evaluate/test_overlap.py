"""Training images that are in a benchmark."""

import io
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from official_rows import OFFICIAL
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from grace.benchmarks.protocols import PROTOCOLS, spec
from grace.cli import app
from grace.data.images import EncodedImage
from grace.errors import GraceError
from grace.evaluate import overlap as room
from grace.results.predictions import SCHEMA, write_predictions


def picture(seed: int) -> Image.Image:
    """Smooth noise, as photographs are."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    kept = io.BytesIO()
    image.save(kept, kind, **settings)
    return kept.getvalue()


def test_resized_and_recompressed_images_look_the_same_and_others_do_not():
    hashes = [room.difference_hash(picture(seed)) for seed in range(40)]
    for seed, look in enumerate(hashes):
        smaller = Image.open(io.BytesIO(encoded(picture(seed).resize((96, 72)), "JPEG", quality=60)))
        assert (room.difference_hash(smaller) ^ look).bit_count() <= room.NEAR
        assert all((look ^ other).bit_count() > room.NEAR for other in hashes[:seed])


def test_bands_find_all_that_a_plain_search_finds():
    seen = room.TrainingImages([])
    rng = np.random.default_rng(0)
    kept = [int(rng.integers(0, 2**63)) for _ in range(50)]
    for look in kept:
        for band, part in zip(seen.bands, room._parts(look), strict=True):
            band.setdefault(part, []).append(look)
    for bits in range(7):
        for look in kept:
            other = look
            for bit in rng.choice(64, bits, replace=False):
                other ^= 1 << int(bit)
            assert (seen.has("", other) == "near") == (bits <= room.NEAR)


def test_questions_are_counted_and_scored_without_them(tmp_path, monkeypatch):
    train = [EncodedImage.from_bytes(str(i), encoded(picture(i), "PNG")) for i in range(3)]
    monkeypatch.setattr(room, "training_images", lambda data: iter(train))
    monkeypatch.setitem(PROTOCOLS["lmms-eval"], "gqa", replace(spec("lmms-eval", "gqa"), size=4))
    shown = [train[0].data, encoded(picture(1), "JPEG", quality=80), encoded(picture(7), "PNG"), b"no image"]
    rows = [{**OFFICIAL["gqa"](i), "image": {"bytes": data, "path": None}} for i, data in enumerate(shown)]
    (tmp_path / "benchmarks").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "benchmarks/gqa.parquet")
    said = {name: [""] * 3 for name in SCHEMA.names} | {"sample_id": ["0", "1", "2"], "score": [1.0, 1.0, 0.0]}
    said |= {name: [0.0] * 3 for name in ("logprob", "entropy")}
    write_predictions(tmp_path / "predictions/gqa.parquet", pd.DataFrame(said), "key")
    room.write_overlap(tmp_path, tmp_path / "overlap.json", {"gqa": "lmms-eval"}, [tmp_path / "predictions"])
    found = json.loads((tmp_path / "overlap.json").read_text())["benchmarks"]["gqa"]
    assert (found["exact"], found["near"], found["questions"], found["unreadable"]) == (["0"], ["1"], 4, 1)
    (scores,) = found["models"].values()
    assert scores == {"score": 2 / 3, "clean_score": 0.0, "clean_questions": 1}


def test_worker_processes_find_the_same(tmp_path):
    images = [EncodedImage.from_bytes(str(i), encoded(picture(i % 5), "PNG")) for i in range(9)]
    alone, together = room.TrainingImages(images), room.TrainingImages(images, workers=2)
    assert alone.exact == together.exact and len(alone.exact) == 5
    assert alone.bands == together.bands


def test_the_experiments_own_benchmarks_and_protocols_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(
        room, "training_images", lambda data: iter([EncodedImage.from_bytes("a", encoded(picture(2), "PNG"))])
    )
    rows = [{**OFFICIAL["gqa"](i), "image": {"bytes": encoded(picture(i), "PNG"), "path": None}} for i in range(4)]
    (tmp_path / "data/benchmarks/llava-1.5").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/benchmarks/llava-1.5/gqa.parquet")
    evaluation = {"benchmarks": ["gqa"], "harness": "grace", "protocol": "llava-1.5", "limit": 3}
    (tmp_path / "run.json").write_text(json.dumps({"family": "llava", "evaluation": evaluation}))
    words = ["overlap", "--data", tmp_path / "data", "--out", tmp_path / "overlap.json"]
    done = CliRunner().invoke(app, [*map(str, words), "--run", str(tmp_path / "run.json")])
    assert done.exit_code == 0 and done.output == "gqa: 1 exact, 0 near of 3 questions\n", done.output
    with pytest.raises(GraceError, match="give either --benchmark, once or more, or --run"):
        CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
