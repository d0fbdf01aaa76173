"""What a cache holds is what the teacher says of each conversation, and the loss from it is the teacher's."""

import hashlib

import pytest
import torch
from tiny_cache import FORMATS, gates_of, run_file

from grace import hashes
from grace.config.schema import Cache
from grace.errors import GraceError
from grace.files import read_json
from grace.models import load_processor
from grace.teacher.commands import finish, info, write
from grace.teacher.identity import expected
from grace.teacher.reader import TeacherCache
from grace.teacher.shard import Shard
from grace.teacher.writer import audited_records


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


def test_info_reads_like_a_summary(home, capsys):
    for format, per_token in (("hidden", "68 B"), ("hidden-int8", "38 B"), ("sampled", "272 B")):
        info(home / format)
        said = capsys.readouterr().out
        assert f"format      {format}" in said and "8 records" in said and "7 Gram matrices" in said
        assert f"{per_token} per supervised token" in said and "per record" in said
        assert "gated DKD" in said and "±" in said
