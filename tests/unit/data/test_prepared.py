"""Examples are read when they are asked for, and are those that `prepare` made."""

import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import started
import torch
from many_examples import write_many
from own_data import llava, prepare, write_source
from some_conversations import conversations

from grace.data import load_conversations, load_examples, load_prepared, prepare_examples
from grace.data.conversations import SCHEMA, as_row
from grace.data.prepared import Chosen, captions_of, keys_of, lengths_of
from grace.demo.processor import build_processor
from grace.errors import GraceError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    build_processor().save_pretrained(folder / "processor")
    said = [("<image>\nwhat colour is it", "red " * (number % 7 + 1)) for number in range(23)]
    records = [llava(id=f"r{number}", said=turns) for number, turns in enumerate(said)]
    write_source(folder, [*records, llava(id="text", image=None, said=("what is a shirt", "red"))])
    return prepare(folder, folder / "processor")


def test_every_example_is_the_tokeniser_s_own(data):
    found, expected = load_prepared(data), load_examples(data, build_processor())
    assert len(found) == len(expected) == 24
    for number in (23, 0, 11, -1):
        assert torch.equal(found[number].input_ids, expected[number].input_ids)
        assert torch.equal(found[number].labels, expected[number].labels)
        assert (found[number].id, found[number].key) == (expected[number].id, expected[number].key)
        assert [i.read() for i in found[number].images] == [i.read() for i in expected[number].images]
    assert lengths_of(found).tolist() == [len(example.input_ids) for example in expected]
    assert list(keys_of(found)) == list(keys_of(expected)) and not captions_of(found).any()
    some = Chosen(found, np.array([5, 2]))
    assert [example.id for example in some] == [expected[5].id, expected[2].id]
    assert [example.id for example in found[3:20:8]] == [expected[i].id for i in (3, 11, 19)]
    again = Chosen(found[10:], np.array([7, 3]))  # some of some are blocks of all too
    assert [example.id for example in again] == [expected[17].id, expected[13].id] and again.examples is found
    assert again[-1].id == expected[13].id and again[:1].examples is found
    assert lengths_of(again).tolist() == [len(expected[number].input_ids) for number in (17, 13)]
    for examples in (found, again):
        with pytest.raises(IndexError):
            examples[24]


def test_images_inside_the_table_are_read_from_its_row_groups(tmp_path):
    """As the demo has them: several row groups, and no image is read before it is asked for."""
    rows = [as_row(conversation) for conversation in conversations()] * 3
    rows = [row | {"id": f"{number}"} for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "train.parquet", row_group_size=2)
    prepare_examples(tmp_path, build_processor(), None)
    found, expected = load_prepared(tmp_path), load_conversations(tmp_path / "train.parquet")
    for number in (8, 0, 4, 1, 8):
        assert [i.read() for i in found[number].images] == [i.read() for i in expected[number].images]
        assert [i.sha256 for i in found[number].images] == [i.sha256 for i in expected[number].images]


@pytest.mark.parametrize("file", ["index.arrow", "train.parquet", "examples.safetensors"])
def test_files_of_different_runs_are_refused(data, tmp_path, file):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(GraceError, match="delete the folder and run `grace prepare` again"):
        load_prepared(tmp_path / "data")
    path.unlink()
    with pytest.raises(GraceError, match="run `grace prepare` again"):
        load_prepared(tmp_path / "data")


MEMORY = """
import sys
from pathlib import Path
from grace.data import load_prepared
def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
before = own()
examples = load_prepared(Path(sys.argv[1]))
seen = sum(len(examples[i * 7919 % len(examples)].input_ids) for i in range(len(examples)))
print(own() - before, seen)
"""


def test_memory_hardly_grows_with_the_conversations(tmp_path):
    """Ten times as many cost less than 300 bytes each; as Python objects they would cost thousands."""
    grown = []
    for count in (5_000, 50_000):
        write_many(tmp_path / f"{count}", count)
        done = subprocess.run(started.python("-c", MEMORY, tmp_path / f"{count}"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown.append(int(done.stdout.split()[0]) * 1024)
    assert grown[1] - grown[0] < 300 * 45_000, grown
