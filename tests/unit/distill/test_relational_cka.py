"""Relational CKA against its textbook form, its invariances, and its degenerate cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.distill import relational_cka, relational_cka_from_gram, relational_cka_sum
from grace.distill.relational_cka import unit_rows
from grace.errors import GraceError


def tokens(seed: int, n: int = 12, width: int = 5, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def textbook(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """1 - HSIC(K_T, K_S) / sqrt(HSIC(K_T, K_T) HSIC(K_S, K_S)), HSIC = trace(K H L H) / (n - 1)^2, in numpy."""

    def gram(x):
        x = x.double().numpy()
        x = x / np.sqrt((x**2).sum(1, keepdims=True))
        return x @ x.T

    def hsic(k, m):
        n = len(k)
        h = np.eye(n) - np.ones((n, n)) / n
        return np.trace(k @ h @ m @ h) / (n - 1) ** 2

    k, m = gram(student), gram(teacher)
    return 1 - hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("n", [2, 9, 60])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_textbook(n, dtype, tolerance):
    student, teacher = tokens(0, n, 4, dtype), tokens(1, n, 7, dtype)
    assert float(relational_cka(student, teacher)) == pytest.approx(textbook(student, teacher), abs=tolerance)


def test_bf16_is_upcast():
    student, teacher = tokens(0, 30, 8, torch.bfloat16), tokens(1, 30, 6, torch.bfloat16)
    loss = relational_cka(student, teacher)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(textbook(student, teacher), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**20), st.integers(2, 30), st.floats(1e-3, 1e3))
def test_invariances(seed, n, factor):
    student, teacher = tokens(seed, n), tokens(seed + 1, n, 7)
    rotation = torch.linalg.qr(tokens(seed + 2, 5, 5))[0]
    lengths = 0.1 + torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    loss = relational_cka(student, teacher)
    assert 0 <= loss <= 1 + 1e-12
    for other in (student @ rotation, factor * student, lengths * student):
        torch.testing.assert_close(relational_cka(other, teacher), loss)
    torch.testing.assert_close(relational_cka(student[order], teacher[order]), loss)
    assert relational_cka(factor * teacher @ torch.linalg.qr(tokens(seed, 7, 7))[0], teacher) == pytest.approx(
        0, abs=1e-12
    )


def test_close_students_keep_their_digits():
    teacher = tokens(0, 40, 16, torch.float32)
    student = teacher + 1e-3 * tokens(1, 40, 16, torch.float32)
    assert float(relational_cka(student, teacher)) == pytest.approx(textbook(student, teacher), rel=1e-3)
    assert textbook(student, teacher) < 1e-5


def test_gradients():
    student, teacher = tokens(0).requires_grad_(), tokens(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: relational_cka(s, teacher), student)
    relational_cka(student, teacher).backward()
    assert teacher.grad is None


def test_from_gram():
    student, teacher = tokens(0), tokens(1, width=9)
    rows = unit_rows(teacher)
    torch.testing.assert_close(relational_cka_from_gram(student, rows @ rows.T), relational_cka(student, teacher))
    half = (rows @ rows.T).half()
    assert relational_cka_from_gram(student.float(), half) == pytest.approx(
        float(relational_cka(student, teacher)), abs=1e-3
    )


def test_sum_skips_and_counts_degenerate_images():
    students = [
        tokens(0, 6).requires_grad_(),
        tokens(1, 9).requires_grad_(),
        torch.ones(4, 5, dtype=torch.float64).requires_grad_(),
        tokens(2, 1).requires_grad_(),
    ]
    teachers = [tokens(3, 6, 7), torch.ones(9, 7, dtype=torch.float64), tokens(4, 4, 7), tokens(5, 1, 7)]
    loss, images, skipped = relational_cka_sum(students, teachers)
    loss.backward()
    assert (int(images), int(skipped)) == (1, 3)
    torch.testing.assert_close(loss, relational_cka(students[0], teachers[0]))
    assert students[0].grad.abs().sum() > 0
    for student in students[1:]:
        assert not student.grad.any()
    rows = [unit_rows(teacher) for teacher in teachers]
    again = relational_cka_sum(students, teacher_grams=[x @ x.T for x in rows])
    torch.testing.assert_close(again[0], loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_degenerate_in_every_precision(dtype):
    """Identical rows leave rounding noise behind, which must not count as relations."""
    row = tokens(0, 1, 64).to(dtype)
    student = row.repeat(576, 1).requires_grad_()
    loss, images, skipped = relational_cka_sum([student], [tokens(1, 576, 32, dtype)])
    loss.backward()
    assert (loss.item(), images.item(), skipped.item()) == (0, 0, 1) and not student.grad.any()


def test_extreme_rows():
    student = tokens(0, 8, 5, torch.float32)
    scales = torch.tensor([1e-30, 1e30, 1e4, 1.0, 1e-4, 1.0, 1.0, 1.0]).unsqueeze(1)
    torch.testing.assert_close(relational_cka(scales * student, student), torch.tensor(0.0), atol=1e-6, rtol=0)
    student[3] = 0
    student.requires_grad_()
    loss = relational_cka(student, tokens(1, 8, 5, torch.float32))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all() and not student.grad[3].any()


def test_images_of_one_size_and_of_several_give_the_sum_of_each():
    sizes = (6, 9, 6, 1, 9, 6)
    students = [tokens(i, n).requires_grad_() for i, n in enumerate(sizes)]
    teachers = [tokens(i + 9, n, 7) for i, n in enumerate(sizes)]
    loss, images, skipped = relational_cka_sum(students, teachers)
    together = torch.autograd.grad(loss, students)
    apart = sum(relational_cka(s, t) for s, t in zip(students, teachers, strict=True))
    torch.testing.assert_close(loss, apart)
    assert (int(images), int(skipped)) == (5, 1)
    for ours, theirs in zip(together, torch.autograd.grad(apart, students), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives_are_refused():
    student = tokens(0).requires_grad_()
    with pytest.raises(GraceError, match="a first derivative alone"):
        torch.autograd.grad(relational_cka(student, tokens(1)), student, create_graph=True)


def test_autocast_changes_nothing():
    student, teacher = tokens(0, 40, 30, torch.float32).requires_grad_(), tokens(1, 40, 30, torch.float32)
    loss = relational_cka(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        again = relational_cka(student, teacher)
    assert torch.equal(loss, again)
    assert torch.equal(*(torch.autograd.grad(value, student)[0] for value in (loss, again)))


def test_any_cut_gives_the_same_sum():
    students, teachers = [tokens(i, 5 + i) for i in range(6)], [tokens(i + 9, 5 + i, 7) for i in range(6)]
    whole = relational_cka_sum(students, teachers)
    for cut in (1, 3, 5):
        parts = [relational_cka_sum(students[part], teachers[part]) for part in (slice(cut), slice(cut, None))]
        for index in range(3):
            torch.testing.assert_close(parts[0][index] + parts[1][index], whole[index])


def test_bad_inputs():
    good = tokens(0)
    with pytest.raises(GraceError, match="no visual tokens"):
        relational_cka(good[:0], good[:0])
    with pytest.raises(
        GraceError, match="student has 12 visual tokens where the teacher's Gram matrix is \\[11, 11\\]"
    ):
        relational_cka(good, good[:11])
    with pytest.raises(GraceError, match="teacher's visual tokens hold a NaN"):
        relational_cka(good, good * torch.nan)
    with pytest.raises(GraceError, match="2 images of the student and 1"):
        relational_cka_sum([good, good], [good])
    with pytest.raises(GraceError, match="either teacher_tokens or teacher_grams"):
        relational_cka_sum([good])
