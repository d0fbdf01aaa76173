"""Gated DKD, plain KD and the gate against direct probabilities in 60-digit arithmetic, and their properties."""

from itertools import pairwise

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.distill import check_inputs, confidence_gate, gated_dkd, gated_dkd_sum, gated_dkd_terms
from grace.distill.objectives.plain import plain
from grace.errors import GraceError


def logits(seed: int, tokens: int, vocabulary: int, scale: float = 2.0, dtype=torch.float32) -> torch.Tensor:
    return (scale * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))).to(dtype)


def by_definition(student, teacher, label, temperature):
    """(TCKD, NCKD, KL, gate) of one token from probabilities themselves; lists of floats in, mpf out."""
    with mpmath.workdps(60):

        def softmax(row, t):
            exponents = [mpmath.e ** (mpmath.mpf(x) / t) for x in row]
            return [x / mpmath.fsum(exponents) for x in exponents]

        def kl(p, q):
            return mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

        p, q = softmax(teacher, temperature), softmax(student, temperature)
        others = [j for j in range(len(p)) if j != label]
        rest_p, rest_q = mpmath.fsum(p[j] for j in others), mpmath.fsum(q[j] for j in others)
        tckd = kl([p[label], rest_p], [q[label], rest_q])
        nckd = kl([p[j] / rest_p for j in others], [q[j] / rest_q for j in others])
        at_one = softmax(teacher, 1)
        entropy = -mpmath.fsum(a * mpmath.log(a) for a in at_one)
        return tckd, nckd, kl(p, q), mpmath.e ** (-entropy / mpmath.log(len(p)))


@pytest.mark.parametrize(("seed", "vocabulary", "scale"), [(0, 2, 1.0), (1, 7, 3.0), (2, 40, 0.1), (3, 30, 12.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_definition(seed, vocabulary, scale, dtype):
    student, teacher = logits(seed, 3, vocabulary, scale, dtype), logits(seed + 50, 3, vocabulary, scale, dtype)
    labels = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    rows = [by_definition(s, t, int(y), 3) for s, t, y in zip(student.tolist(), teacher.tolist(), labels, strict=True)]
    tckd, nckd, kl, gate = (
        torch.tensor([float(x) for x in column], dtype=torch.float64) for column in zip(*rows, strict=True)
    )
    tolerance = dict(rtol=1e-9, atol=1e-13) if dtype == torch.float64 else dict(rtol=3e-5, atol=1e-7)
    got = gated_dkd_terms(student, teacher, labels, 3.0)
    for ours, theirs in zip(got, (tckd, nckd, gate), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)
    want = (gate * 9 * (0.7 * tckd + 5 * nckd)).sum() / gate.sum()
    torch.testing.assert_close(gated_dkd(student, teacher, labels, 3.0, 0.7, 5.0).double(), want, **tolerance)
    torch.testing.assert_close(plain(student, teacher, labels, temperature=3.0).double(), 9 * kl, **tolerance)
    torch.testing.assert_close(confidence_gate(teacher).double(), gate, **tolerance)


@pytest.mark.parametrize("gap", [20.0, 60.0, 200.0])
def test_confident_tokens_keep_their_target_part(gap):
    """1 - p of e^-20 to e^-200 cannot be formed in fp32; a clamp would lose the loss here."""
    teacher, student = [gap, 0.0, -1.0, 0.5], [gap * 0.8, 0.3, 0.0, 0.0]
    want = by_definition(student, teacher, 0, 1)[0]
    for dtype in (torch.float32, torch.float64):
        got = gated_dkd_terms(
            torch.tensor([student], dtype=dtype), torch.tensor([teacher], dtype=dtype), torch.tensor([0]), 1.0
        )[0]
        if float(want) > 1e-37:
            assert float(got) == pytest.approx(float(want), rel=1e-4)


def test_student_close_to_its_teacher():
    teacher = logits(0, 4, 60)
    student = teacher + 1e-3 * logits(1, 4, 60)
    labels = torch.tensor([1, 2, 3, 4])
    exact = gated_dkd(student.double(), teacher.double(), labels)
    assert 1e-7 < exact < 1e-4
    assert float(gated_dkd(student, teacher, labels)) == pytest.approx(float(exact), rel=2e-3)


def test_extremes_are_finite_in_value_and_gradient():
    rows = torch.zeros(6, 33)
    rows[0, 0], rows[1, 0], rows[2, 5], rows[3, 5] = 1e4, -1e4, 1e4, -1e4
    rows[4] = torch.linspace(-1e4, 1e4, 33)
    for dtype in (torch.float32, torch.bfloat16):
        for shift in range(6):
            student = rows.roll(shift, 0).to(dtype).requires_grad_()
            for loss in (
                gated_dkd(student, rows.to(dtype), torch.zeros(6, dtype=torch.long)),
                plain(student, rows.to(dtype), None, temperature=2.0).sum(),
            ):
                (gradient,) = torch.autograd.grad(loss, student)
                assert torch.isfinite(loss) and loss >= 0 and torch.isfinite(gradient).all()
    label_wrong = torch.tensor([[1e4, 0.0, 0.0]])
    loss = gated_dkd(label_wrong, torch.tensor([[-1e4, 0.0, 0.0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(2**2 * 5000, rel=1e-3)  # T^2 times a log-odds of 1e4 / T


def test_large_vocabulary():
    student, teacher = logits(0, 2, 151_936), logits(1, 2, 151_936)
    labels = torch.tensor([0, 151_935])
    got = gated_dkd(student, teacher, labels)
    assert float(got) == pytest.approx(float(gated_dkd(student.double(), teacher.double(), labels)), rel=1e-5)


def test_gradients():
    student, teacher = logits(0, 3, 6, dtype=torch.float64).requires_grad_(), logits(1, 3, 6, dtype=torch.float64)
    labels = torch.tensor([0, 3, 5])
    assert torch.autograd.gradcheck(lambda s: gated_dkd(s, teacher, labels, 3.0, 0.5, 4.0), student)


def test_gradient_flows_to_the_student_alone():
    student, teacher = logits(0, 3, 6).requires_grad_(), logits(1, 3, 6).requires_grad_()
    labels = torch.tensor([0, 3, 5])
    gated_dkd(student, teacher, labels).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert not confidence_gate(teacher).requires_grad
    assert not gated_dkd_terms(student, teacher, labels)[2].requires_grad


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**20), st.integers(2, 50), st.floats(0.01, 50))
def test_gate_bounds_and_zero_iff_equal(seed, vocabulary, scale):
    student, teacher = logits(seed, 4, vocabulary, scale), logits(seed + 1, 4, vocabulary, scale)
    labels = torch.arange(4) % vocabulary
    gate = confidence_gate(teacher)
    assert (gate > 0).all() and (gate <= 1).all()
    tckd, nckd, _ = gated_dkd_terms(student, teacher, labels)
    assert (tckd >= 0).all() and (nckd >= 0).all() and (tckd + nckd > 0).all()
    assert gated_dkd(teacher, teacher, labels) == 0
    # a constant added to all logits of a token changes no distribution
    assert gated_dkd(teacher + 8, teacher, labels) == pytest.approx(0, abs=1e-9)


def test_gate_ends():
    assert confidence_gate(torch.zeros(1, 50)).item() == pytest.approx(torch.tensor(-1.0).exp().item())
    certain = torch.zeros(1, 50)
    certain[0, 0] = 1e4
    assert confidence_gate(certain).item() == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**20), st.lists(st.integers(0, 12), max_size=4))
def test_any_cut_gives_the_same_loss_and_gradient(seed, cuts):
    student = logits(seed, 12, 20, dtype=torch.float64).requires_grad_()
    teacher, labels = logits(seed + 1, 12, 20, dtype=torch.float64), torch.arange(12)
    whole = gated_dkd(student, teacher, labels)
    (want,) = torch.autograd.grad(whole, student)
    edges = [0, *sorted(cuts), 12]
    gates = confidence_gate(teacher).sum()
    parts = [gated_dkd_sum(student[a:b], teacher[a:b], labels[a:b])[0] / gates for a, b in pairwise(edges)]
    (got,) = torch.autograd.grad(sum(parts), student)
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("student", "teacher", "labels", "says"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, dtype=torch.long), "vocabulary has 5"),
        (torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(2, dtype=torch.long), "2 tokens and teacher logits 3"),
        (torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), "at least 2"),
        (torch.zeros(5), torch.zeros(5), torch.zeros(1, dtype=torch.long), "tokens, vocab"),
        (torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0, 5]), "label 5 of token 1"),
        (torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([-100, 0]), "label -100 of token 0"),
        (torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2), "tensor of 2 integers"),
        (torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(2, dtype=torch.bool), "tensor of 2 integers"),
        (torch.zeros(2, 5), torch.zeros(2, 5), [0, 1], "but are list"),
        (torch.full((2, 5), torch.nan), torch.zeros(2, 5), torch.tensor([0, 1]), "student logits hold a NaN"),
        (
            torch.zeros(2, 5),
            torch.full((2, 5), -torch.inf),
            torch.tensor([0, 1]),
            "teacher logits hold a NaN or an inf",
        ),
        (torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), "no supervised tokens"),
    ],
)
def test_bad_inputs(student, teacher, labels, says):
    with pytest.raises(GraceError, match=says):
        gated_dkd(student, teacher, labels)


def test_bad_temperature_and_explicit_check():
    with pytest.raises(GraceError, match="temperature is 0"):
        gated_dkd(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0, 1]), temperature=0.0)
    with pytest.raises(GraceError, match="temperature is inf"):
        gated_dkd(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0, 1]), temperature=float("inf"))
    with pytest.raises(GraceError, match="student logits"):
        check_inputs(torch.tensor([[0.0, torch.inf]]), torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(GraceError, match="at least 2 classes"):
        confidence_gate(torch.zeros(3, 1))


def test_empty_sums():
    empty = torch.zeros(0, 5, requires_grad=True)
    loss, gate = gated_dkd_sum(empty, torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and gate == 0 and empty.grad.shape == (0, 5)
