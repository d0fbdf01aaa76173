"""A cache as it is used: made by the subcommands from a tiny teacher, killed, damaged, refused, made whole again."""

import hashlib
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_models import make_llava

from grace import hashes
from grace.config.job_parameters import CacheRun
from grace.config.schema import Cache
from grace.data import Conversation, EncodedImage, load_examples, prepare_examples
from grace.data.conversations import SCHEMA, as_row, asked_and_answered
from grace.demo.processor import build_processor
from grace.errors import GraceError
from grace.files import check_manifest, read_json, whole_folder, write_json, write_manifest
from grace.models import load_model, load_processor
from grace.teacher.commands import finish, info, verify, write
from grace.teacher.forward import check_examples, plan, plan_rows
from grace.teacher.identity import expected, processor_pins
from grace.teacher.reader import TeacherCache
from grace.teacher.shard import Shard
from grace.teacher.writer import audited_records

FORMATS = ("hidden", "hidden-int8", "sampled")
IMAGE = 4
COLOURS = ("red", "blue", "green")


def make_image(number):
    """A PNG of noise; the same number is the same image."""
    pixels = np.random.default_rng(number).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def row(number):
    """A conversation; numbers 0 and 1 are about the same image."""
    turns = [
        (f"what colour is the {thing}", COLOURS[(number + i) % 3]) for i, thing in enumerate(("shirt", "bag", "coat"))
    ]
    image = EncodedImage.from_bytes(f"row{number}", make_image(max(number, 1)))
    return as_row(Conversation(f"row{number}", (image,), asked_and_answered(turns[: 1 + number % 3])))


def run_file(folder, format="hidden", shards=3, **change):
    values = dict(
        family="llava", compute_dtype="float32", cache=Cache(format=format, shards=shards, audit=0.3), temperature=2.0
    )
    path = folder / f"{format}-{shards}-{len(change)}.json"
    write_json(path, CacheRun(**{**values, **change}).model_dump())
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, a teacher, and a finished cache of every format."""
    home = tmp_path_factory.mktemp("experiment")
    (home / "data").mkdir()
    processor = build_processor()
    processor.save_pretrained(home / "data/processor")
    pq.write_table(
        pa.Table.from_pylist([row(number) for number in range(8)], schema=SCHEMA), home / "data/train.parquet"
    )
    prepare_examples(home / "data", processor, tower=None)
    write_manifest(home / "data")
    for name, seed in (("teacher", 0), ("student", 1)):
        with whole_folder(home / name) as folder:
            make_llava(seed, vocabulary=len(processor.tokenizer)).to(torch.bfloat16).save_pretrained(folder)
    for format in FORMATS:
        arguments = (run_file(home, format), home / "teacher", home / "data", home / format)
        write(*arguments)
        finish(*arguments)
    return home


@pytest.fixture(scope="module")
def examples(home):
    return load_examples(home / "data", load_processor(home / "data/processor"))


@pytest.fixture(scope="module")
def seen(home, examples):
    """What the teacher says of every conversation by itself: states, labels, visual tokens, in fp32."""
    model, processor = load_model(home / "teacher", torch.float32), load_processor(home / "data/processor")
    found, penultimate = {}, []
    model.model.language_model.layers[-2].register_forward_hook(lambda *call: penultimate.append(call[-1]))
    for example in examples:
        with torch.no_grad():
            pixels = processor.image_processor(images=[example.images[0].open()], return_tensors="pt")
            out = model.model(input_ids=example.input_ids[None], **pixels)
        asked = (example.labels[1:] != -100).nonzero().flatten()
        states, labels = out.last_hidden_state[0, asked], example.labels[asked + 1]
        visual = penultimate[-1][0, example.input_ids == IMAGE]
        logits = (states @ model.lm_head.weight.T).detach()
        found[example.key] = SimpleNamespace(
            states=states, labels=labels, visual=visual.double(), logits=logits.double()
        )
    return found


@pytest.fixture
def copy(home, tmp_path):
    """A copy of the `hidden` cache to damage, with the arguments that its subcommands take."""
    shutil.copytree(home / "hidden", tmp_path / "hidden")
    return run_file(tmp_path), home / "teacher", home / "data", tmp_path / "hidden"


def gates_of(logits):
    return torch.exp(-torch.special.entr(logits.softmax(1)).sum(1) / math.log(logits.shape[1]))


def dkd(student, teacher, labels, temperature=2.0):
    """4 (TCKD + 4 NCKD) of every token in float64."""
    p, q = ((x.double() / temperature).log_softmax(1) for x in (teacher, student))
    label = labels[:, None]
    p_label, q_label = p.gather(1, label)[:, 0], q.gather(1, label)[:, 0]
    p_rest, q_rest = ((-x.exp()).log1p() for x in (p_label, q_label))
    tckd = p_label.exp() * (p_label - q_label) + p_rest.exp() * (p_rest - q_rest)
    kl = (p.exp() * (p - q)).scatter(1, label, 0).sum(1)
    return 4 * (tckd + 4 * (kl / p_rest.exp() - (p_rest - q_rest)))


def test_records_are_what_the_teacher_says_of_each_conversation(home, examples, seen):
    cache = TeacherCache.open(home / "hidden")
    keys = [examples[index].key for index in (5, 0, 7, 2)]
    targets = cache.batch(keys)
    assert targets.counts == [len(seen[key].labels) for key in keys]
    assert targets.hidden.dtype == torch.bfloat16 and targets.gates.dtype == torch.float32
    states = torch.cat([seen[key].states for key in keys])
    torch.testing.assert_close(targets.hidden.float(), states, rtol=2**-8, atol=1e-4)
    gates = torch.cat([gates_of(seen[key].logits) for key in keys])
    torch.testing.assert_close(targets.gates.double(), gates, rtol=1e-5, atol=0)
    assert cache.gate_sum(keys) == pytest.approx(float(gates.sum()), rel=1e-5)
    for key, matrix in zip(keys, targets.grams, strict=True):
        unit = seen[key].visual / seen[key].visual.norm(dim=1, keepdim=True)
        assert matrix.shape == (9, 9)
        torch.testing.assert_close(matrix.double(), unit @ unit.T, rtol=0, atol=0.01)
    assert cache.records == 8 and cache.tokens == sum(len(one.labels) for one in seen.values())
    words = len(load_processor(home / "data" / "processor").tokenizer)
    assert (cache.vocabulary, cache.width, cache.head.shape) == (words, 32, (words, 32))
    assert cache.head.dtype == torch.float32


def test_one_image_has_one_gram_matrix(home, examples):
    cache = TeacherCache.open(home / "hidden")
    assert cache.manifest["records"] == 8 and cache.manifest["grams"] == 7
    first, second = cache.batch([examples[0].key, examples[1].key]).grams
    assert torch.equal(first, second)


@pytest.mark.parametrize(("format", "tolerance"), [("hidden", 0.02), ("hidden-int8", 0.05), ("sampled", 0.1)])
def test_the_loss_from_every_format_is_the_teacher_s(home, examples, seen, format, tolerance):
    from grace.teacher.sampled import sampled_terms

    cache = TeacherCache.open(home / format, expected(home / "data", 2.0, home / "teacher"))
    keys = [example.key for example in examples]
    targets = cache.batch(keys)
    teacher, labels = (torch.cat([getattr(seen[key], name) for key in keys]) for name in ("logits", "labels"))
    student = teacher + torch.randn(teacher.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = gates_of(teacher)
    exact = (gates * dkd(student, teacher, labels)).sum() / gates.sum()
    if format == "sampled":
        tckd, nckd = sampled_terms(student, targets.sampled, labels, 2.0)
        per_token = 4 * (tckd + 4 * nckd)
    else:
        per_token = dkd(student, targets.hidden.double() @ cache.head.double().T, labels)
    loss = (targets.gates * per_token).sum() / cache.gate_sum(keys)
    assert abs(loss / exact - 1) < tolerance


def test_the_audit_reports_each_format_s_error(home, examples):
    errors = {}
    for format in FORMATS:
        found = read_json(home / format / "manifest.json")["audit_results"]
        assert found["records"] == 3 and found["temperature"] == 2.0  # one of each shard's two or three
        far, near = found["gated_dkd"].values()
        assert far["loss"] > 50 * near["loss"] > 0
        assert far["standard_error"] > 0 and far["gradient_cosine"] > 0.95
        errors[format] = (abs(far["relative_error"]), abs(near["relative_error"]))
        assert found["relational_cka"]["images"] == 3 and abs(found["relational_cka"]["error"]) < 1e-2
    assert errors["hidden"][0] < 0.01 and errors["hidden-int8"][0] < 0.1 and errors["sampled"][0] < 0.1
    assert errors["hidden"][1] < errors["hidden-int8"][1]  # int8's floor shows where student and teacher are close


def test_the_audit_of_a_bf16_teacher_finds_nothing_lost_in_hidden(home, tmp_path):
    arguments = (run_file(tmp_path, compute_dtype="bfloat16"), home / "teacher", home / "data", tmp_path / "cache")
    write(*arguments)
    finish(*arguments)
    cache = TeacherCache.open(tmp_path / "cache")
    assert cache.head.dtype == torch.bfloat16
    for found in cache.manifest["audit_results"]["gated_dkd"].values():
        assert abs(found["relative_error"]) < 1e-6 and found["gradient_cosine"] > 0.999999


def test_audited_records_are_few_but_never_none():
    keys = [hashlib.sha256(bytes([number])).hexdigest() for number in range(100)]
    assert [len(audited_records(keys, share)) for share in (0, 0.001, 0.1, 1)] == [0, 1, 10, 100]
    assert audited_records([], 0.1) == set() and len(audited_records(keys, 0.5, most=7)) == 7
    shuffled = keys[::-1]
    assert {shuffled[i] for i in audited_records(shuffled, 0.1)} == {keys[i] for i in audited_records(keys, 0.1)}


def test_the_sum_of_gates_needs_no_record(home, examples, monkeypatch):
    cache = TeacherCache.open(home / "hidden")
    keys = [example.key for example in examples[:5]]
    expected = sum(float(cache.batch([key]).gates.double().sum()) for key in keys)
    monkeypatch.setattr(Shard, "tokens", None)
    monkeypatch.setattr(Shard, "verify", None)
    assert cache.gate_sum(keys) == expected


def test_a_cache_without_its_index_says_what_to_do(copy):
    folder = copy[-1]
    index = folder / "index.safetensors"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    with pytest.raises(
        GraceError, match=r"index.safetensors does not have the bytes .* run `grace cache finish` again"
    ):
        TeacherCache.open(folder)
    finish(*copy)
    assert TeacherCache.open(folder).gate_sum([]) == 0


def test_a_shard_is_hashed_once_per_machine(home, examples, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hashes, "REMEMBERED_FROM", 1)
    monkeypatch.setattr(hashes, "SETTLED_S", -1.0)
    read = []
    monkeypatch.setattr(hashes, "sha256", lambda path, real=hashes.sha256: read.append(path) or real(path))
    for _ in range(3):  # as processes would open it
        cache = TeacherCache.open(home / "hidden")
        for example in examples:
            cache.batch([example.key])
    assert len(read) == len(set(read)) == 1 + len(cache.shards)


def test_a_record_that_is_not_there_is_said_so_before_training(home):
    with pytest.raises(GraceError, match="hidden: no record of the conversation with key ffff"):
        TeacherCache.open(home / "hidden").check_keys(["ff" * 32])


@pytest.mark.parametrize("tokens", [4096, 60])
def test_packed_rows_write_the_same_records(home, tmp_path, seen, tokens):
    """One row of everything, and rows of one or two conversations; both by the truth, not by the padded cache."""
    run = run_file(tmp_path, cache=Cache(shards=2, audit=0.3, pass_tokens=tokens))
    write(run, home / "teacher", home / "data", tmp_path / "hidden")
    finish(run, home / "teacher", home / "data", tmp_path / "hidden")
    cache = TeacherCache.open(tmp_path / "hidden")
    for key, truth in seen.items():
        target = cache.batch([key])
        assert torch.allclose(target.hidden.float(), truth.states, atol=0.02, rtol=0.01)
        assert torch.allclose(target.gates.double(), gates_of(truth.logits), atol=1e-5)
        rows = torch.nn.functional.normalize(truth.visual, dim=1)
        assert torch.allclose(target.grams[0].double(), rows @ rows.T, atol=0.01)


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
    writer = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
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


NAME = "shard-00001-of-00003.safetensors"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_flipped_bit_is_named_and_only_its_shard_is_rebuilt(copy, examples, place):
    out = copy[-1]
    size = (out / NAME).stat().st_size
    flip(out / NAME, int(place * size))
    with pytest.raises(GraceError, match=NAME):
        verify(out)
    with pytest.raises(GraceError, match=NAME):
        TeacherCache.open(out).batch([example.key for example in examples])
    with pytest.raises(GraceError, match=NAME):
        TeacherCache.open(out, verify=True)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    write(*copy)
    verify(out)
    finish(*copy)
    assert {
        path.name for path, before in times.items() if "shard" in path.name and path.stat().st_mtime_ns != before
    } == {NAME}
    TeacherCache.open(out, verify=True)


def test_every_bad_file_is_named_at_once(copy):
    out = copy[-1]
    whole = (out / NAME).read_bytes()
    (out / NAME).write_bytes(whole[:-7])
    (out / "shard-00002-of-00003.safetensors").unlink()
    flip(out / "teacher_head.safetensors", -1)
    with pytest.raises(GraceError) as caught:
        verify(out)
    said = str(caught.value)
    assert f"{NAME} has {len(whole) - 7} of {len(whole)} bytes" in said
    assert "shard-00002-of-00003.safetensors is missing" in said and "teacher_head.safetensors" in said
    assert "shard-00000" not in said
    with pytest.raises(GraceError, match=r"has \d+ of \d+ bytes"):
        TeacherCache.open(out)


def test_a_damaged_head_does_not_reach_a_loss(copy):
    flip(copy[-1] / "teacher_head.safetensors", -1)
    with pytest.raises(GraceError, match=r"teacher_head.safetensors does not have the bytes.*finish"):
        _ = TeacherCache.open(copy[-1]).head


def test_a_damaged_sidecar_means_writing_its_shard_again(copy):
    sidecar = copy[-1] / "shard-00000-of-00003.json"
    sidecar.write_text("{}")
    write(*copy)
    assert read_json(sidecar)["records"] == 2


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_cache_of_something_else_is_refused_in_one_sentence(home, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(home / "data", data)
    asked = expected(data, 2.0, home / "teacher")
    TeacherCache.open(home / "sampled", asked)
    TeacherCache.open(home / "hidden", expected(data, 3.0))  # serves every temperature
    shutil.copytree(home / "teacher", tmp_path / "same")
    edit(tmp_path / "same/environment.json", lambda environment: environment.update(code="of another commit"))
    TeacherCache.open(home / "hidden", expected(data, 2.0, tmp_path / "same"))
    with pytest.raises(GraceError, match=r"another temperature \(temperature: 2.0, expected 3.0\)"):
        TeacherCache.open(home / "sampled", {**asked, "temperature": 3.0})
    with pytest.raises(GraceError, match="another teacher"):
        TeacherCache.open(home / "hidden", expected(data, 2.0, home / "student"))
    with pytest.raises(GraceError, match=r"another format \(format: hidden, expected sampled\)"):
        TeacherCache.open(home / "hidden", {"format": "sampled"})
    for path, word in (
        ("chat_template.jinja", "another chat template"),
        ("tokenizer.json", "another tokenizer"),
        ("processor_config.json", "another image processor"),
    ):
        file = data / "processor" / path
        before = file.read_text()
        if path.endswith("json"):
            edit(file, lambda value: value.update(changed=1))
        else:
            file.write_text(before + " ")
        with pytest.raises(GraceError, match=word) as caught:
            TeacherCache.open(home / "hidden", expected(data))
        assert str(caught.value).count("another") == 2  # the fault, and "point to another": nothing else differs
        file.write_text(before)
    with pytest.raises(GraceError, match="not a finished cache"):
        TeacherCache.open(tmp_path)
    with pytest.raises(GraceError, match="not the manifest of a teacher cache"):
        TeacherCache.open(home / "teacher")


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


def test_info_reads_like_a_summary(home, capsys):
    for format, per_token in (("hidden", "68 B"), ("hidden-int8", "38 B"), ("sampled", "272 B")):
        info(home / format)
        said = capsys.readouterr().out
        assert f"format      {format}" in said and "8 records" in said and "7 Gram matrices" in said
        assert f"{per_token} per supervised token" in said and "per record" in said
        assert "gated DKD" in said and "±" in said


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda manifest: manifest.pop("tokenizer"), "`tokenizer`: field required"),
        (lambda manifest: manifest.update(records="8"), "`records`: input should be a valid integer"),
        (lambda manifest: manifest.update(temperature=None), "a sampled cache has `temperature`"),
        (lambda manifest: manifest["audit_results"].pop("tokens"), r"`audit_results\.tokens`: field required"),
    ],
)
def test_a_damaged_manifest_of_a_cache_is_named(home, tmp_path, change, said):
    shutil.copy(home / "sampled/manifest.json", tmp_path / "manifest.json")
    edit(tmp_path / "manifest.json", change)
    with pytest.raises(GraceError, match=rf"manifest\.json: .*{said}.*grace cache finish"):
        info(tmp_path)


def test_a_damaged_processor_is_another_one_or_a_sentence(home, tmp_path):
    folder = shutil.copytree(home / "data/processor", tmp_path / "processor")
    whole = processor_pins(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff{{ bos_token }}")
    assert processor_pins(folder)["template"] != whole["template"]
    (folder / "processor_config.json").write_text("[]")
    with pytest.raises(GraceError, match=r"processor_config\.json: holds no JSON object"):
        processor_pins(folder)
