"""`prepare` on data of a user's own: the same bytes however it is run, and every bad record listed."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from own_data import dialogue, image_bytes, llava, prepare, report, rows, write_source

from grace.config.sections import FilesData
from grace.data import load_conversations, load_prepared
from grace.data import prepare as prepare_module
from grace.data import tokenise as tokenise_module
from grace.data.examples import Tokeniser
from grace.data.mix import plan_order
from grace.demo.processor import build_processor
from grace.errors import GraceError
from grace.files import check_manifest, contents_hash, read_json


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of three records, so that a few records are several parts."""
    monkeypatch.setattr(prepare_module, "ROWS", 3)


def records(n=10):
    text = llava(id="text", image=None, said=("what is a shirt", "red"))
    return [*(llava(id=f"r{i}", said=("<image>\nwhat colour is it", "red " * (i + 1))) for i in range(n - 1)), text]


def test_what_is_written_is_what_training_reads(tmp_path, processor, small_parts):
    write_source(tmp_path, records())
    out = prepare(tmp_path, processor)
    check_manifest(out)
    assert not (tmp_path / "data-parts").exists()
    conversations = load_conversations(out / "train.parquet")
    assert sorted(c.id for c in conversations) == sorted(r["id"] for r in records())
    expected = Tokeniser(build_processor())(conversations)
    for found, example in zip(load_prepared(out), expected, strict=True):
        assert (found.id, found.key, found.caption) == (example.id, example.key, example.caption)
        assert torch.equal(found.input_ids, example.input_ids) and torch.equal(found.labels, example.labels)
        assert len(found.images) == len(example.images) and all(i.open().size == (40, 30) for i in found.images)
    assert report(out)["notes"] == {"conversations without an image": 1, "images": 9}


def test_workers_kills_and_mount_points_leave_the_bytes(tmp_path, processor, small_parts, monkeypatch):
    source = write_source(tmp_path, records())
    expected = contents_hash(prepare(tmp_path, processor) / "manifest.json")
    assert contents_hash(prepare(tmp_path, processor, workers=2, name="two") / "manifest.json") == expected

    made = []

    def killed(task):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(tokenise_module.make_part(task))

    monkeypatch.setattr(prepare_module, "make_part", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, processor, name="again")
    assert not (tmp_path / "again").exists()
    damaged = made[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    redone = []
    monkeypatch.setattr(prepare_module, "make_part", lambda task: redone.append(tokenise_module.make_part(task)))
    assert contents_hash(prepare(tmp_path, processor, name="again") / "manifest.json") == expected
    assert made[0] in redone and made[1] not in redone

    (tmp_path / "mount").mkdir()
    (tmp_path / "images").rename(tmp_path / "mount" / "elsewhere")
    moved = {"path": str(source), "images": str(tmp_path / "mount" / "elsewhere")}
    out = prepare(tmp_path, processor, source=moved, name="moved")
    assert contents_hash(out / "manifest.json") == expected
    about = [read_json(folder / "manifest.json")["data"] for folder in (out, tmp_path / "data")]
    assert about[0] == about[1]
    assert load_prepared(out)[0].images[0].open().size == (40, 30)
    with pytest.raises(GraceError, match="cannot be read"):
        [image.open() for example in load_prepared(tmp_path / "data") for image in example.images]


def test_a_killed_run_leaves_no_worker_and_is_gone_on_with(tmp_path, processor):
    write_source(tmp_path, records(600))
    code = (
        "from pathlib import Path; from own_data import prepare; import sys;"
        "prepare(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, name='killed')"
    )
    paths = os.pathsep.join(map(str, [Path(__file__).parents[2] / "helpers", *sys.path]))
    environment = {**os.environ, "PYTHONPATH": paths}
    running = psutil.Popen([sys.executable, "-c", code, tmp_path, processor], env=environment)
    parts = tmp_path / "killed-parts"
    while not list(parts.glob("0*.json")):
        assert running.poll() is None
        time.sleep(0.02)
    children = running.children(recursive=True)
    running.kill()
    running.wait()
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=60)[1]
    out = prepare(tmp_path, processor, name="killed")
    assert contents_hash(out / "manifest.json") == contents_hash(prepare(tmp_path, processor) / "manifest.json")


def test_a_part_is_made_again_where_an_image_or_a_setting_changed(tmp_path, processor, small_parts, monkeypatch):
    write_source(tmp_path, [*records(4), llava(id="bad", image="gone.jpg")])
    made = []
    monkeypatch.setattr(prepare_module, "make_part", lambda task: made.append(tokenise_module.make_part(task).name))
    with pytest.raises(GraceError, match="max_bad"):
        prepare(tmp_path, processor, max_bad=0.0)
    assert len(made) == 2 and (tmp_path / "data-parts" / "report.md").exists()
    with pytest.raises(GraceError, match="max_bad"):
        prepare(tmp_path, processor, max_bad=0.1)
    assert len(made) == 2  # nothing to do again
    os.utime(tmp_path / "images" / "a.jpg", ns=(1, 1))
    with pytest.raises(GraceError, match="max_bad"):
        prepare(tmp_path, processor, max_bad=0.1)
    assert len(made) == 3  # the part that shows it
    prepare(tmp_path, processor, max_bad=0.5, max_pixels=2000)
    assert len(made) == 5


def test_bad_records_are_skipped_listed_and_counted(tmp_path, processor):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cut.jpg").write_bytes(image_bytes(size=(400, 400))[:1500])
    bad = [
        llava(id="missing", image="gone.jpg"),
        llava(id="cut", image="cut.jpg"),
        llava(id="null", said=("<image>", None)),
        llava(id="empty", said=("<image>", "")),
        None,
    ]
    path = write_source(tmp_path, [*records(5), *bad])
    out = prepare(tmp_path, processor, max_bad=0.5)
    found = report(out)
    assert set(rows(out)) == {"r0", "r1", "r2", "r3", "text"}
    assert found["records"] == 10 and found["conversations"] == 5 and sum(found["bad"].values()) == 5
    assert [(entry["record"], entry["id"]) for entry in found["skipped"]] == [
        (5, "missing"), (6, "cut"), (7, "null"), (8, "empty"), (9, None)
    ]  # fmt: skip
    page = (out / "report.md").read_text()
    assert "### image cannot be decoded: 1" in page and "record 6, id cut: 0/cut.jpg" in page
    with pytest.raises(GraceError) as caught:
        prepare(tmp_path, processor, max_bad=0.49, name="other")
    said = str(caught.value)
    assert said.startswith("5 of 10 records are bad, more than data.max_bad 0.49 allows (")
    assert "image is missing: 1" in said and "missing (gone.jpg)" in said and "\n" not in said
    path.write_text(json.dumps([llava(id="line\nfeed", image="\x1b[2J\n")]))
    with pytest.raises(GraceError) as caught:
        prepare(tmp_path, processor, max_bad=0.0, name="signs")
    assert r"first line\nfeed (\x1b[2J\n)" in str(caught.value) and str(caught.value).isprintable()
    path.write_text(json.dumps(bad))
    with pytest.raises(GraceError, match="no conversation to train on"):
        prepare(tmp_path, processor, max_bad=1.0, name="none")


def test_long_conversations_lose_turns_or_are_left_out(tmp_path, processor):
    said = ["<image>\nwhat colour is it", "red", "and <image>", "red", "what is it", "red " * 50]
    long = llava(id="long", image=["a.jpg", "sub/b.png"], said=said)
    write_source(tmp_path, [long, llava(id="hopeless", said=("<image>", "red " * 90)), llava(id="short")])
    out = prepare(tmp_path, processor, max_length=50, max_bad=0.0)
    found = rows(out)
    assert set(found) == {"long", "short"}
    assert len(found["long"]["messages"]) == 4 and len(found["long"]["images"]) == 2
    assert report(out)["left out"] == {"longer than max_length": 1}
    assert report(out)["notes"]["conversations cut between turns to fit max_length"] == 1
    assert max(len(example.input_ids) for example in load_prepared(out)) <= 50
    found = rows(prepare(tmp_path, processor, max_length=25, name="shorter"))
    assert len(found["long"]["messages"]) == 2 and len(found["long"]["images"]) == 1


def test_ids_are_made_unique(tmp_path, processor):
    answers = ["red", "blue", "green", "black"]
    given = ["x", "x", "x#2", None]
    write_source(tmp_path, [llava(id=i, said=("<image>", a)) for i, a in zip(given, answers, strict=True)])
    out = prepare(tmp_path, processor)
    found = {name: row["messages"][1]["content"][0]["text"] for name, row in rows(out).items()}
    assert found == {"x": "red", "x#2'": "blue", "x#2": "green", "0-3": "black"}
    assert report(out)["notes"]["an id was given"] == 1


def test_sources_are_mixed_by_weight(tmp_path, processor, small_parts):
    first = write_source(tmp_path, [llava(id=f"a{i}") for i in range(8)])
    second = tmp_path / "b.jsonl"
    openai = {"messages": dialogue("what is it", "red", keys=("role", "content"), roles=("user", "assistant"))}
    second.write_text("".join(json.dumps({"id": f"b{i}", **openai}) + "\n" for i in range(6)))
    sources = [
        {"path": str(first), "images": str(tmp_path / "images"), "weight": 0.5},
        {"path": str(second), "format": "openai", "weight": 2, "limit": 4},
    ]
    out = prepare(tmp_path, processor, source=sources)
    names = [c.id for c in load_conversations(out / "train.parquet")]
    assert len(names) == 12 and sum(name.startswith("a") for name in names) == 4
    assert sorted(n for n in names if n[0] == "b") == sorted(f"b{i}{s}" for i in range(4) for s in ("", "#2"))
    assert names != sorted(names) and {n[0] for n in names[:6]} == {"a", "b"}
    again = prepare(tmp_path, processor, source=sources, name="again", workers=1)
    other = prepare(tmp_path, processor, source=sources, name="other", seed=1)
    assert contents_hash(again / "manifest.json") == contents_hash(out / "manifest.json")
    assert [c.id for c in load_conversations(other / "train.parquet")] != names
    assert [(s["name"], s["records"]) for s in report(out)["sources"]] == [("conversations.json", 8), ("b.jsonl", 4)]


def test_encoded_images_travel_with_their_rows(tmp_path, processor, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from grace.data import mix

    colours = ["red", "green", "blue", "white", "black"]
    table = [
        {
            "images": [{"bytes": image_bytes(c, format="PNG"), "path": None}],
            "texts": [{"user": "q", "assistant": "red"}],
        }
        for c in colours
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "c.parquet")
    monkeypatch.setattr(mix, "GROUP_BYTES", 150)
    monkeypatch.setattr(mix, "PILE_BYTES", 2000)
    out = prepare(tmp_path, processor, source={"path": str(tmp_path / "c.parquet")})
    shown = {example.id: example.images[0].open().getpixel((0, 0)) for example in load_prepared(out)}
    assert shown["0-0"] == (255, 0, 0) and shown["0-2"] == (0, 0, 255) and len(set(shown.values())) == 5
    assert pq.read_metadata(out / "train.parquet").num_row_groups > 1


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, processor, monkeypatch):
    path = write_source(tmp_path, records(3))

    def meanwhile(task):
        path.write_text(json.dumps(records(4)))
        return tokenise_module.make_part(task)

    monkeypatch.setattr(prepare_module, "make_part", meanwhile)
    with pytest.raises(GraceError, match="changed while it was read"):
        prepare(tmp_path, processor)


def test_a_source_that_changes_while_the_parts_are_mixed_is_noticed(tmp_path, processor, monkeypatch):
    """Snakemake would record the new file as what the data was made from."""
    path = write_source(tmp_path, records(3))

    def meanwhile(*given, real=prepare_module.write_mix):
        path.write_text(json.dumps(records(4)))
        return real(*given)

    monkeypatch.setattr(prepare_module, "write_mix", meanwhile)
    with pytest.raises(GraceError, match="changed while it was read"):
        prepare(tmp_path, processor)
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    assert len(rows(prepare(tmp_path, processor))) == 4


def test_what_is_no_file_among_the_benchmarks_is_named(tmp_path, processor):
    """A copy of a device would fill the disk."""
    asked = tmp_path / "benchmarks"
    asked.mkdir()
    (asked / "pope.tsv").write_text("question")
    faults = {"device": "/dev/zero", "nothing": str(tmp_path / "gone")}
    for name, target in faults.items():
        (asked / name).symlink_to(target)
        with pytest.raises(GraceError, match=f"benchmarks/{name}: a pipe, a device or a link to nothing; take it out"):
            prepare_module.prepare_files(
                FilesData(source="files"), processor, asked, tmp_path / "out", tmp_path / "parts"
            )
        (asked / name).unlink()
    os.mkfifo(asked / "pipe")
    with pytest.raises(GraceError, match="benchmarks/pipe: a pipe, a device or a link to nothing"):
        prepare_module.prepare_files(FilesData(source="files"), processor, asked, tmp_path / "out", tmp_path / "parts")
    (asked / "pipe").unlink()
    prepare_module.prepare_files(FilesData(source="files"), processor, asked, tmp_path / "out", tmp_path / "parts")
    assert (tmp_path / "out/benchmarks/pope.tsv").read_text() == "question"


def test_a_missing_image_folder_is_said_at_once(tmp_path, processor):
    write_source(tmp_path, records(3))
    source = {"path": str(tmp_path / "conversations.json"), "images": str(tmp_path / "nowhere")}
    with pytest.raises(GraceError, match="nowhere: no such folder"):
        prepare(tmp_path, processor, source=source)
    with pytest.raises(GraceError, match="image folder is not set"):
        prepare(tmp_path, processor, source={"path": source["path"]}, max_bad=0.0)


def test_the_order_of_a_mix():
    ids = np.arange(10, dtype=np.uint64)
    order = plan_order(ids, [4, 6], [1.5, 0.5], seed=3)
    counts = np.bincount(order.rows, minlength=10)
    assert counts[:4].min() == 1 and counts[:4].sum() == 6 and counts[4:].sum() == 3 and counts[4:].max() == 1
    assert sorted(order.places) == list(range(9)) and (np.diff(order.rows) >= 0).all()
    assert order.copies.sum() == 2
