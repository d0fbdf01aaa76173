"""The `sampled` format against the equations in float64: exact where it says so, unbiased where it says so."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.errors import GraceError
from grace.teacher import sampled
from grace.teacher.sampled import (
    distillation_loss_from_record,
    encode_sampled,
    entry_counts,
    pack_entries,
    sampled_terms,
    unpack_entries,
)

T = 2.0


def terms(student, teacher, labels, temperature=T):
    """TCKD and NCKD of every token, straight from their definition, float64."""
    rows = torch.arange(len(labels))
    log_p, log_q = ((x.double() / temperature).log_softmax(1) for x in (teacher, student))
    others = torch.ones_like(log_p, dtype=torch.bool)
    others[rows, labels] = False
    shape = (len(labels), -1)
    p_rest, q_rest = (x[others].view(shape).logsumexp(1) for x in (log_p, log_q))
    p_label, q_label = log_p[rows, labels], log_q[rows, labels]
    tckd = p_label.exp() * (p_label - q_label) + p_rest.exp() * (p_rest - q_rest)
    p_hat, q_hat = log_p[others].view(shape) - p_rest[:, None], log_q[others].view(shape) - q_rest[:, None]
    return tckd, (p_hat.exp() * (p_hat - q_hat)).sum(1)


def logits(tokens, vocabulary, scale=2.0, noise=0.5, seed=0):
    """Teacher and student logits [tokens, vocab] and labels [tokens]."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(tokens, vocabulary, generator=generator) * scale
    student = teacher + noise * torch.randn(tokens, vocabulary, generator=generator)
    return teacher, student, torch.randint(vocabulary, (tokens,), generator=generator)


def uniforms(tokens, seed=0):
    return torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(
    bits=st.integers(1, 20),
    pairs=st.lists(st.tuples(st.integers(0, 2**20 - 1), st.floats(-40, 0)), min_size=1, max_size=20),
)
def test_entries_hold_any_id_and_log_probability(bits, pairs):
    vocabulary = 2**bits
    ids = torch.tensor([i % vocabulary for i, _ in pairs])
    log_p = torch.tensor([p for _, p in pairs], dtype=torch.float64)
    entries = pack_entries(ids, log_p, vocabulary)
    assert entries.dtype == torch.int32
    found_ids, found_log_p = unpack_entries(entries, vocabulary)
    assert torch.equal(found_ids, ids)
    step = 32 / 2 ** (32 - bits)
    assert ((found_log_p - log_p.clamp(min=step - 32)).abs() <= 0.5001 * step + 2e-6).all()


@pytest.mark.parametrize("scale", [0.5, 5.0, 40.0])
def test_the_four_scalars_are_exact(scale):
    teacher, _, labels = logits(20, 500, scale)
    labels[0] = teacher[0].argmax()
    record = encode_sampled(teacher, labels, T, uniforms(20))
    log_p = (teacher.double() / T).log_softmax(1)
    rows = torch.arange(20)
    rest = log_p.clone()
    rest[rows, labels] = -math.inf
    log_rest = rest.logsumexp(1)
    torch.testing.assert_close(record.log_odds.double(), log_p[rows, labels] - log_rest, rtol=2e-6, atol=2e-6)
    p_hat = (rest - log_rest[:, None]).exp()
    negentropy = torch.special.entr(p_hat).sum(1).neg()
    torch.testing.assert_close(record.negentropy.double(), negentropy, rtol=2e-6, atol=2e-6)
    full = teacher.double().softmax(1)
    gate = torch.exp(-torch.special.entr(full).sum(1) / math.log(500))
    torch.testing.assert_close(record.gates.double(), gate, rtol=2e-6, atol=0)
    top = rest.topk(32).indices
    log_tail = rest.scatter(1, top, -math.inf).logsumexp(1) - log_rest
    torch.testing.assert_close(record.log_tail.double(), log_tail, rtol=2e-6, atol=2e-5)


def test_head_and_tail_are_what_they_say():
    teacher, _, labels = logits(50, 400)
    record = encode_sampled(teacher, labels, T, uniforms(50))
    ids, log_p = unpack_entries(record.entries, 400)
    assert not (ids == labels[:, None]).any()
    rest = (teacher.double() / T).scatter(1, labels[:, None], -math.inf).log_softmax(1)
    assert torch.equal(ids[:, :32].sort(1).values, rest.topk(32).indices.sort(1).values)
    torch.testing.assert_close(log_p[:, :32].double(), rest.gather(1, ids[:, :32]), rtol=0, atol=1e-5)
    assert not (ids[:, 32:, None] == ids[:, None, :32]).any()
    tail = rest.gather(1, ids[:, 32:]) - record.log_tail[:, None]
    torch.testing.assert_close(log_p[:, 32:].double(), tail, rtol=0, atol=1e-5)


def test_a_token_takes_272_bytes_and_ids_reach_qwen_s_vocabulary():
    teacher, student, _ = logits(2, 151_936)
    teacher[:, -40:] += 20  # the head lies beyond what 16 bits can name
    labels = torch.tensor([151_935, 3])
    record = encode_sampled(teacher, labels, T, uniforms(2))
    assert sum(part.nbytes for part in record.tensors().values()) == 2 * 272
    assert (unpack_entries(record.entries, 151_936)[0][:, :32] >= 151_936 - 40).all()
    exact = terms(student, teacher, labels)[0]
    torch.testing.assert_close(sampled_terms(student, record, labels, T)[0].double(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [2, 3, 33, 34, 64, 65])
def test_a_small_vocabulary_is_held_whole(vocabulary):
    assert entry_counts(vocabulary) == (vocabulary - 1, 0)
    teacher, student, labels = logits(30, vocabulary)
    record = encode_sampled(teacher, labels, T, uniforms(30))
    leaves = [student.double().requires_grad_(), student.double().requires_grad_()]
    tckd, nckd = sampled_terms(leaves[0], record, labels, T)
    exact = terms(leaves[1], teacher, labels)
    torch.testing.assert_close(tckd, exact[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(nckd, exact[1], rtol=1e-5, atol=1e-7)
    (tckd + nckd).sum().backward()
    sum(exact).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=1e-6)


def many_draws(teacher, student, labels, draws):
    """NCKD of one token for many independent tail samples [draws], and the mean gradient [vocab]."""
    repeat = [x.expand(draws, *x.shape[1:]) for x in (teacher, student, labels)]
    record = encode_sampled(repeat[0], repeat[2], T, uniforms(draws, seed=7))
    leaf = repeat[1].double().requires_grad_()
    nckd = sampled_terms(leaf, record, repeat[2], T)[1]
    nckd.mean().backward()
    return nckd.detach(), leaf.grad.sum(0), record


@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_nckd_and_its_gradient_are_unbiased(noise):
    teacher, student, labels = logits(1, 600, 2.0, noise, seed=3)
    nckd, gradient, record = many_draws(teacher, student, labels, 2000)
    leaf = student.double().requires_grad_()
    (exact,) = terms(leaf, teacher, labels)[1]
    exact.backward()
    error = nckd.std() / math.sqrt(2000)
    assert error < 0.006 * exact  # else the next line could not fail
    assert abs(nckd.mean() - exact) < 4 * error
    # leaving the sample out, which is what a single tail bucket does, is off by many times that
    bucket = nckd.mean() - exact.detach()
    ids, log_p = unpack_entries(record.entries[:1], 600)
    s = student.double() / T
    rest = s.scatter(1, torch.cat([labels[:, None], ids[:, :32]], 1), -math.inf).logsumexp(1)
    log_ratio = s.gather(1, ids[:, 32:]) - rest[:, None] - log_p[:, 32:]
    share = record.log_tail[0].exp() * (torch.expm1(log_ratio) - log_ratio).mean()
    assert abs(bucket - share) > 40 * error
    one = many_draws(teacher, student, labels, 1)[1]
    assert torch.cosine_similarity(gradient, leaf.grad[0], dim=0) > 0.99
    assert torch.cosine_similarity(gradient, leaf.grad[0], dim=0) > torch.cosine_similarity(one, leaf.grad[0], dim=0)


def test_the_noise_vanishes_as_the_student_reaches_its_teacher():
    relative = []
    for noise in (0.5, 0.05, 0.005):
        teacher, student, labels = logits(64, 2000, 2.0, noise)
        record = encode_sampled(teacher, labels, T, uniforms(64))
        exact = terms(student, teacher, labels)[1].sum()
        relative.append(float((sampled_terms(student.double(), record, labels, T)[1].sum() - exact) / exact))
    assert max(map(abs, relative)) < 0.08
    teacher, _, labels = logits(64, 2000)
    record = encode_sampled(teacher, labels, T, uniforms(64))
    assert (torch.stack(sampled_terms(teacher, record, labels, T)) < 1e-6).all()


@pytest.mark.parametrize("gap", [30.0, 300.0, 3000.0])
@pytest.mark.parametrize("label", [0, 1])
def test_extreme_confidence_stays_finite(gap, label):
    """1 - p is far below fp32's spacing here; TCKD still follows, and nothing overflows."""
    teacher, student, _ = logits(4, 200, 1.0)
    teacher[:, 0] += gap
    student[:, 1] += gap / 2
    labels = torch.full((4,), label)
    record = encode_sampled(teacher, labels, T, uniforms(4))
    leaf = student.clone().requires_grad_()
    tckd, nckd = sampled_terms(leaf, record, labels, T)
    (tckd + nckd).sum().backward()
    assert torch.isfinite(leaf.grad).all()
    exact = terms(student, teacher, labels)
    torch.testing.assert_close(tckd.double(), exact[0], rtol=1e-4, atol=1e-6)
    if label == 1:  # else the teacher's other classes are spread and NCKD is a sample
        torch.testing.assert_close(nckd.double(), exact[1], rtol=1e-3, atol=1e-4)


def test_a_record_does_not_depend_on_how_its_tokens_are_cut(monkeypatch):
    teacher, _, labels = logits(9, 300)
    whole = encode_sampled(teacher, labels, T, uniforms(9))
    monkeypatch.setattr(sampled, "_ELEMENTS_AT_ONCE", 600)
    cut = encode_sampled(teacher, labels, T, uniforms(9))
    assert all(torch.equal(value, cut.tensors()[name]) for name, value in whole.tensors().items())


@pytest.mark.parametrize("mode", ["gated", "plain"])
def test_the_training_loss_is_the_same_in_chunks(monkeypatch, mode):
    teacher, _, labels = logits(11, 60)
    record = encode_sampled(teacher, labels, T, uniforms(11))
    generator = torch.Generator().manual_seed(5)
    hidden, head = torch.randn(11, 8, generator=generator), torch.randn(60, 8, generator=generator)

    def losses():
        leaves = (hidden.clone().requires_grad_(), head.clone().requires_grad_())
        out = distillation_loss_from_record(*leaves, record, labels, mode=mode, ce_weight=0.3, kd_weight=0.2)
        out["loss"].backward()
        return out, [leaf.grad for leaf in leaves]

    whole, gradients = losses()
    student = hidden.double() @ head.double().T
    ce = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
    tckd, nckd = terms(student, teacher, labels)
    kd = 4 * (record.gates * (tckd + 4 * nckd)).sum()
    if mode == "plain":
        p, q = ((x.double() / T).log_softmax(1) for x in (teacher, student))
        kd = 4 * (p.exp() * (p - q)).sum()
    torch.testing.assert_close(whole["ce_sum"].double(), ce, rtol=1e-5, atol=0)
    torch.testing.assert_close(whole["kd_sum"].double(), kd, rtol=1e-5, atol=0)
    assert whole["gate_sum"] == pytest.approx(11 if mode == "plain" else float(record.gates.sum()))
    monkeypatch.setattr(sampled, "_ELEMENTS_AT_ONCE", 4 * 60)
    cut, cut_gradients = losses()
    torch.testing.assert_close(cut["loss"], whole["loss"], rtol=1e-6, atol=0)
    for a, b in zip(cut_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_tokens_give_a_loss_of_zero_with_gradient():
    teacher, _, _ = logits(1, 60)
    record = encode_sampled(teacher, torch.tensor([0]), T, uniforms(1))[:0]
    hidden, head = torch.ones(0, 8, requires_grad=True), torch.ones(60, 8, requires_grad=True)
    out = distillation_loss_from_record(hidden, head, record, torch.empty(0, dtype=torch.int64))
    out["loss"].backward()
    assert out["loss"] == 0 and hidden.grad is not None


def test_what_it_cannot_hold_is_refused():
    with pytest.raises(GraceError, match="1048576 entries, the teacher's has 2000000; choose `hidden`"):
        entry_counts(2_000_000)
    teacher, student, labels = logits(3, 60)
    record = encode_sampled(teacher, labels, T, uniforms(3))
    with pytest.raises(GraceError, match="one tokenizer"):
        sampled_terms(torch.cat([student, student], 1), record, labels, T)
