"""Writing a cache: in which passes, in shards that a killed writer resumes, and what is refused."""

import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import started
import torch
from tiny_cache import FORMATS, IMAGE, run_file
from tiny_models import make_llava

from grace.errors import GraceError
from grace.files import check_manifest, read_json, whole_folder
from grace.teacher.commands import finish, write
from grace.teacher.forward import check_examples, plan, plan_rows
from grace.teacher.identity import expected
from grace.teacher.reader import TeacherCache


def test_packed_rows_hold_every_conversation_once_and_are_not_overfull():
    lengths = [5, 90, 30, 31, 7, 200, 1] * 50
    examples = [SimpleNamespace(input_ids=torch.zeros(length)) for length in lengths]
    rows = list(plan_rows(examples, 100))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 100 or len(row) == 1 for row in rows)
    assert len(rows) < 1.1 * sum(min(length, 100) for length in lengths) / 100


def test_batches_are_of_like_length_and_bounded():
    lengths = [5, 90, 30, 31, 7, 200, 1]
    examples = [SimpleNamespace(input_ids=torch.zeros(length)) for length in lengths]
    batches = plan(examples, tokens=100)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert [[lengths[index] for index in batch] for batch in batches] == [[200], [90], [31, 30, 7], [5, 1]]


KILLED = """
import sys, time
import grace.teacher.shard as shard
from grace.teacher.commands import write
from pathlib import Path
real, calls = shard.save_file, []
def slow(tensors, path):
    calls.append(path)
    if len(calls) == 2:
        path.write_bytes(b"half a shard")
        print("half", flush=True)
        time.sleep(60)
    real(tensors, path)
shard.save_file = slow
write(*map(Path, sys.argv[1:]))
"""


def test_a_killed_writer_resumes_at_the_first_missing_shard(home, tmp_path):
    out = tmp_path / "cache"
    arguments = (run_file(home), home / "teacher", home / "data", out)
    writer = subprocess.Popen(started.python("-c", KILLED, *arguments), stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "half\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert {path.name for path in out.glob("shard-*")} == {
        "shard-00000-of-00003.safetensors",
        "shard-00000-of-00003.json",
    }
    assert len(list(out.glob(".*.part"))) == 1
    with pytest.raises(GraceError, match="shard-00001-of-00003 is not written; shard-00002-of-00003 is not written"):
        finish(*arguments)
    first = (out / "shard-00000-of-00003.safetensors").stat().st_mtime_ns
    write(*arguments)
    finish(*arguments)
    assert (out / "shard-00000-of-00003.safetensors").stat().st_mtime_ns == first
    assert not list(out.glob(".*.part"))
    files = {path.name for path in out.iterdir()}
    assert files == {path.name for path in (home / "hidden").iterdir()}
    for name in files:
        assert (out / name).read_bytes() == (home / "hidden" / name).read_bytes()


def test_shards_written_apart_are_the_same_as_together(home, tmp_path):
    arguments = (run_file(home), home / "teacher", home / "data", tmp_path)
    for shard in (2, 0, 1):
        write(*arguments, shard)
    for path in (home / "hidden").glob("shard-*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(GraceError, match="--shard 3: the run has shards 0 to 2"):
        write(*arguments, 3)


def test_more_shards_than_conversations_leave_some_empty(home, tmp_path, examples):
    arguments = (run_file(home, shards=11), home / "teacher", home / "data", tmp_path)
    write(*arguments)
    finish(*arguments)
    cache = TeacherCache.open(tmp_path, verify=True)
    assert cache.batch([example.key for example in examples]).hidden.shape == (cache.tokens, 32)
    # another division in the same folder replaces it
    arguments = (run_file(home, shards=2), *arguments[1:])
    write(*arguments)
    finish(*arguments)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 2
    check_manifest(tmp_path)


def test_shards_of_another_teacher_are_not_finished_but_rewritten(copy, home):
    run, _, data, out = copy
    with pytest.raises(GraceError, match="shard-00000-of-00003 was made with another teacher"):
        finish(run, home / "student", data, out)
    write(run, home / "student", data, out, 0)
    assert (
        read_json(out / "shard-00000-of-00003.json")["pins"]["teacher"]
        == expected(data, None, home / "student")["teacher"]
    )


def test_bad_examples_are_refused_by_name(examples):
    model = make_llava(vocabulary=75)
    example = examples[0]
    check_examples(examples, model, 75)
    blind = SimpleNamespace(**{**vars(example), "input_ids": example.input_ids[example.input_ids != IMAGE]})
    with pytest.raises(GraceError, match=r"conversation row0: it has 1 images, and visual tokens .id 4. for 0"):
        check_examples([blind], model, 75)
    for label in (75, -1):
        labels = example.labels.clone()
        labels[-1] = label
        with pytest.raises(GraceError, match="conversation row0: a label lies outside the model's vocabulary of 75"):
            check_examples([SimpleNamespace(**{**vars(example), "labels": labels})], model, 75)


def test_a_teacher_that_gives_nan_is_refused_by_the_conversation(home, tmp_path):
    model = make_llava(vocabulary=75)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with whole_folder(tmp_path / "teacher") as folder:
        model.save_pretrained(folder)
    for format in FORMATS:
        with pytest.raises(GraceError, match=r"conversation row\d: the teacher's logits are NaN or infinite"):
            write(run_file(tmp_path, format), tmp_path / "teacher", home / "data", tmp_path / "cache")
    assert not list(Path(tmp_path / "cache").glob("*.safetensors"))
