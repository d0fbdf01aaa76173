"""Every kind of file gives the same records; a broken one is one sentence, a broken line one bad record."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_data import dialogue, image_bytes, llava

from grace.data.sources import BadRecord, files, open_source
from grace.data.sources.paths import ImageFolder
from grace.errors import GraceError

RECORDS = [llava(id=str(n), said=("<image>\nq" + "é🙂]" * n, "a, {1}")) for n in range(40)]


def read(path):
    source = open_source(path)
    found = list(source.records())
    assert source.count() == len(found)
    return found


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_json_arrays_are_streamed_whatever_the_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "BLOCK", block)
    path = tmp_path / "c.json"
    for text in (
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2, ensure_ascii=False),
        "\ufeff" + json.dumps(RECORDS),
    ):
        path.write_text(text)
        assert read(path) == RECORDS
    path.write_text('[12, 345,\n null , "x", [1, 2]]')
    assert read(path) == [12, 345, None, "x", [1, 2]]
    path.write_text(" [ ] \n")
    assert read(path) == []


def test_the_array_is_not_held_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(RECORDS * 50))
    monkeypatch.setattr(files, "BLOCK", 1000)
    decoded = []
    original = files._characters
    monkeypatch.setattr(files, "_characters", lambda p: (decoded.append(len(b)) or b for b in original(p)))
    records = open_source(path).records()
    for _ in range(100):
        next(records)
    assert sum(decoded) < path.stat().st_size / 5


def test_json_lines(tmp_path):
    text = "\n".join(json.dumps(record) for record in RECORDS)
    for name in ("c.jsonl", "c.json"):
        (tmp_path / name).write_text(text + "\n\n")
        assert read(tmp_path / name) == RECORDS
    (tmp_path / "c.jsonl").write_text('{"id": 1}\n{"id": \n{"id": 3}\n' + "[" * 100_000 + "\n")
    good, bad, other, deep = read(tmp_path / "c.jsonl")
    assert (good, other) == ({"id": 1}, {"id": 3}) and isinstance(deep, BadRecord)
    assert isinstance(bad, BadRecord) and bad.detail.startswith("line 2")


def test_parquet_and_saved_data_sets(tmp_path):
    from datasets import Dataset, DatasetDict, Image, Sequence

    encoded = image_bytes()
    plain = [{**r, "conversations": dialogue("<image>\nq", "a")} for r in RECORDS]
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet") == plain
    (tmp_path / "several").mkdir()
    for number in (1, 0):
        pq.write_table(pa.Table.from_pylist(plain[20 * number :][:20]), tmp_path / f"several/{number}.parquet")
    assert read(tmp_path / "several") == plain

    rows = [{"images": [{"bytes": encoded, "path": None}], "texts": [{"user": "q", "assistant": "a"}]}] * 3
    data = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    data.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == rows
    DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(GraceError, match=r"several splits \(train\)"):
        open_source(tmp_path / "splits")
    assert read(tmp_path / "splits" / "train") == rows
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(GraceError, match="not a readable data set"):
        read(tmp_path / "saved")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"null", "not a list of conversations"),
        (b'"x"', "not a list of conversations"),
        (b"<html>", "not a list of conversations"),
        (b'{"a": 1,\n "b": 2}', "holds an object, not a list"),
        (b'[{"id": "1"}, {"id": "2', "ends in the middle of record 1"),
        (b'[{"id": "1"}, ', "ends in the middle of record 1"),
        (b'[{"id": "1"}, {"id": oops}' + b" " * 100 + b"]", "in record 1"),
        (b'[{"id": "1"}]\n[{"id": "2"}]', "more follows behind the list"),
        (b'[{"id": "\xff"}]', "not UTF-8 near byte 9"),
        (b'[{"id": "\xe2\x82', "ends inside a character"),
        (b"[" + b"[" * 200_000, "record 0 is nested too deeply"),
        (b"[" + b"9" * 5000 + b", 1]", "thousands of digits"),
        (b'[{"a": "' + b"x" * 50_000 + b'"}]', "more than 4,000 characters"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, monkeypatch, text, sentence):
    monkeypatch.setattr(files, "LONGEST_RECORD", 4000 if b"xxx" in text else files.LONGEST_RECORD)
    monkeypatch.setattr(files, "BLOCK", 1000 if b"xxx" in text else files.BLOCK)
    path = tmp_path / "c.json"
    path.write_bytes(text)
    with pytest.raises(GraceError, match=sentence) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_source(tmp_path):
    with pytest.raises(GraceError, match=r"none.json: no such file"):
        open_source(tmp_path / "none.json")
    with pytest.raises(GraceError, match="no Parquet file"):
        open_source(tmp_path)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(GraceError, match="not a readable Parquet file"):
        read(tmp_path / "c.parquet")


@pytest.fixture
def tree(tmp_path):
    """images/a.jpg, images/sub/b.jpg, links that stay and links that leave, and a secret outside."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for file in ("images/a.jpg", "images/sub/b.jpg", "elsewhere/c.jpg", "images-too.jpg"):
        (tmp_path / file).write_bytes(b"x")
    (images / "inside.jpg").symlink_to("sub/b.jpg")
    (images / "outside.jpg").symlink_to("../elsewhere/c.jpg")
    (images / "coco").symlink_to(tmp_path / "elsewhere")
    (images / "loop.jpg").symlink_to("loop.jpg")
    (images / "dangling.jpg").symlink_to("nothing.jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "inside"),
    [("a.jpg", "a.jpg"), ("./sub//b.jpg", "sub/b.jpg"), ("sub\\b.jpg", "sub/b.jpg"), ("inside.jpg", "inside.jpg")],
)
def test_paths_inside_the_image_folder(tree, name, inside):
    assert ImageFolder(str(tree / "images")).find(name)[0] == inside


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("a\0b", "null character"),
        ("/etc/hostname", "not relative"),
        ("file:///etc/hostname", "not relative"),
        ("C:\\a.jpg", "not relative"),
        ("../images-too.jpg", "climbs"),
        ("..\\elsewhere\\c.jpg", "climbs"),
        ("sub/../a.jpg", "climbs"),
        ("outside.jpg", "outside the image folder"),
        ("coco/c.jpg", "outside the image folder"),
        ("loop.jpg", "cannot be followed"),
        ("dangling.jpg", "missing"),
        ("gone.jpg", "missing"),
        ("a.jpg/b.jpg", "cannot be followed"),
        ("a" * 5000, "cannot be followed"),
        ("sub", "no regular file"),
        (".", "no regular file"),
    ],
)
def test_paths_that_are_refused(tree, name, reason):
    with pytest.raises(BadRecord, match=reason):
        ImageFolder(str(tree / "images")).find(name)


def test_links_may_lead_where_the_config_says(tree):
    folder = ImageFolder(str(tree / "images"), [str(tree / "elsewhere")])
    assert folder.find("coco/c.jpg")[0] == "coco/c.jpg"


def test_a_pipe_is_not_waited_for(tree):
    import os

    os.mkfifo(tree / "images" / "pipe.jpg")
    with pytest.raises(BadRecord, match="no regular file"):
        ImageFolder(str(tree / "images")).find("pipe.jpg")
