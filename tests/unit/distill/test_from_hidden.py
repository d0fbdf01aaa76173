"""The chunked loss from hidden states against the composed losses, whatever the cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from grace.distill import confidence_gate, distillation_loss_from_hidden, gated_dkd_sum
from grace.distill.chunks import cut_rows
from grace.distill.objectives.plain import plain
from grace.errors import GraceError

TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = 11, 23, 6, 8


def inputs(seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return (
        random(TOKENS, WIDTH).requires_grad_(), random(VOCABULARY, WIDTH).requires_grad_(),
        random(TOKENS, TEACHER_WIDTH), random(VOCABULARY, TEACHER_WIDTH), labels,
    )  # fmt: skip


def composed(student_hidden, student_head, teacher_hidden, teacher_head, labels, mode, ce_weight, kd_weight):
    student, teacher = student_hidden @ student_head.T, teacher_hidden @ teacher_head.T
    ce = cross_entropy(student, labels, reduction="sum")
    if mode == "gated":
        kd, gates = gated_dkd_sum(student, teacher, labels, 3.0, 0.5, 4.0)
    elif mode == "plain":
        kd, gates = plain(student, teacher, labels, temperature=3.0).sum(), torch.full_like(ce, len(labels))
    else:
        kd, gates = torch.zeros_like(ce), torch.zeros_like(ce)
    return {"loss": ce_weight * ce + kd_weight * kd, "ce_sum": ce, "kd_sum": kd, "gate_sum": gates}


CONSTANTS = dict(temperature=3.0, alpha=0.5, beta_dkd=4.0)


@pytest.mark.parametrize("mode", ["gated", "plain", "none"])
@pytest.mark.parametrize("workspace", [None, 600, 2000])
def test_equals_the_composed_loss(mode, workspace):
    tensors = inputs()
    want = composed(*tensors, mode, 0.3, 0.7)
    want_gradients = torch.autograd.grad(want["loss"], tensors[:2])
    got = distillation_loss_from_hidden(
        *tensors,
        mode=mode,
        ce_weight=torch.tensor(0.3, dtype=torch.float64),
        kd_weight=0.7,
        workspace=workspace,
        **CONSTANTS,
    )
    got["loss"].mul(2).backward()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)
    for tensor, gradient in zip(tensors[:2], want_gradients, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)
    assert not got["kd_sum"].requires_grad


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20), st.lists(st.integers(0, TOKENS), max_size=4), st.sampled_from(["gated", "plain"]))
def test_any_cut_gives_the_same_loss_and_gradient(seed, cuts, mode):
    hidden, head, teacher_hidden, teacher_head, labels = inputs(seed)
    whole = distillation_loss_from_hidden(
        hidden, head, teacher_hidden, teacher_head, labels, mode=mode, ce_weight=0.1, kd_weight=0.2
    )
    want = torch.autograd.grad(whole["loss"], (hidden, head))
    edges = [0, *sorted(cuts), TOKENS]
    parts = [
        distillation_loss_from_hidden(
            hidden[a:b], head, teacher_hidden[a:b], teacher_head, labels[a:b], mode=mode, ce_weight=0.1, kd_weight=0.2
        )
        for a, b in pairwise(edges)
    ]
    got = torch.autograd.grad(sum(part["loss"] for part in parts), (hidden, head))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    for name in ("loss", "ce_sum", "kd_sum", "gate_sum"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])


def test_frozen_head_and_frozen_states():
    tensors = inputs()
    want = torch.autograd.grad(composed(*tensors, "gated", 1.0, 1.0)["loss"], tensors[:2])
    for index, frozen in ((0, 1), (1, 0)):
        tensors = list(inputs())
        tensors[frozen] = tensors[frozen].detach()
        distillation_loss_from_hidden(*tensors, **CONSTANTS)["loss"].backward()
        torch.testing.assert_close(tensors[index].grad, want[index])
    with torch.no_grad():
        assert not distillation_loss_from_hidden(*inputs())["loss"].requires_grad


def test_cached_gates_replace_computed_ones():
    tensors = inputs()
    gates = confidence_gate(tensors[2] @ tensors[3].T)
    want, got = distillation_loss_from_hidden(*tensors), distillation_loss_from_hidden(*tensors, gates=gates)
    torch.testing.assert_close(got["kd_sum"], want["kd_sum"])
    ungated = distillation_loss_from_hidden(*tensors, gates=torch.ones(TOKENS))
    assert ungated["gate_sum"] == TOKENS and ungated["kd_sum"] > got["kd_sum"]


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(student_dtype):
    """A bf16 teacher beside a student in fp32 or bf16; gradients come back in the student's dtype."""
    exact = inputs(1)
    want = composed(*exact, "gated", 0.3, 0.7)
    want_gradients = torch.autograd.grad(want["loss"], exact[:2])
    student = [tensor.detach().to(student_dtype).requires_grad_() for tensor in exact[:2]]
    teacher = [tensor.bfloat16() for tensor in exact[2:4]]
    got = distillation_loss_from_hidden(*student, *teacher, exact[4], ce_weight=0.3, kd_weight=0.7, **CONSTANTS)
    got["loss"].backward()
    assert got["loss"].dtype == torch.float32
    assert got["loss"].item() == pytest.approx(want["loss"].item(), rel=2e-2)
    for tensor, gradient in zip(student, want_gradients, strict=True):
        assert tensor.grad.dtype == student_dtype
        cosine = torch.cosine_similarity(tensor.grad.double().flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.999


def test_no_tokens():
    hidden, head, teacher_hidden, teacher_head, labels = inputs()
    got = distillation_loss_from_hidden(hidden[:0], head, teacher_hidden[:0], teacher_head, labels[:0])
    got["loss"].backward()
    assert got["loss"] == 0 and not head.grad.any()


def test_second_backward_is_refused():
    got = distillation_loss_from_hidden(*inputs())
    got["loss"].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got["loss"].backward()


def test_second_derivatives_are_refused():
    tensors = inputs()
    with pytest.raises(GraceError, match="a first derivative alone"):
        torch.autograd.grad(distillation_loss_from_hidden(*tensors)["loss"], tensors[0], create_graph=True)


def test_a_scaled_loss_scales_its_gradients():
    tensors = inputs()
    whole, scaled = (
        torch.autograd.grad(factor * distillation_loss_from_hidden(*tensors)["loss"], tensors[:2])
        for factor in (1, -2.5)
    )
    for gradient, other in zip(whole, scaled, strict=True):
        torch.testing.assert_close(-2.5 * gradient, other)


def test_chunks_fit_the_workspace():
    for vocabulary in (160, 32_064, 151_936):
        head = torch.empty(vocabulary, 1, dtype=torch.bfloat16, device="meta")
        cut = cut_rows(head, 10**6, None, 448 << 20)
        assert 0 < cut.inner <= cut.outer and (cut.outer + cut.inner) * vocabulary * 2 <= 448 << 20
        wide = cut_rows(head, 10**6, torch.float32, 448 << 20)
        assert (wide.outer + wide.inner) * vocabulary * 4 <= 448 << 20
    assert cut == (torch.bfloat16, 1024, 512)
    assert cut_rows(head, 10**6, None, 448 << 20, tensors=8) == (torch.bfloat16, 1024, 64)
    assert cut_rows(head, 3, None, 1) == (torch.bfloat16, 2, 1)


def test_logits_in_fp32_are_those_of_the_rounded_states():
    exact = inputs()
    rounded = [tensor.detach().to(torch.bfloat16) for tensor in exact[:4]]
    want = distillation_loss_from_hidden(*[tensor.double() for tensor in rounded], exact[4], workspace=600)
    wide, narrow = (
        distillation_loss_from_hidden(*rounded, exact[4], workspace=600, logits_dtype=dtype)
        for dtype in (torch.float32, None)
    )
    for name in ("ce_sum", "kd_sum"):
        assert float(wide[name]) == pytest.approx(float(want[name]), rel=1e-6)
        assert abs(float(narrow[name]) / float(want[name]) - 1) > 1e-4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({3: torch.zeros(9, TEACHER_WIDTH)}, f"student's vocabulary has {VOCABULARY} entries and the teacher's 9"),
        ({1: torch.zeros(VOCABULARY, 5)}, "the student's hidden states .* do not fit"),
        ({2: torch.zeros(TOKENS - 1, TEACHER_WIDTH)}, "labels must be a tensor of 10 integers"),
        ({2: None}, "give the teacher's hidden states"),
        ({4: torch.full((TOKENS,), VOCABULARY)}, f"label {VOCABULARY} of token 0"),
    ],
)
def test_bad_inputs(change, says):
    tensors = [change.get(index, tensor) for index, tensor in enumerate(inputs(dtype=torch.float32))]
    with pytest.raises(GraceError, match=says):
        distillation_loss_from_hidden(*tensors)
    with pytest.raises(GraceError, match="mode is 'hard'"):
        distillation_loss_from_hidden(*inputs(), mode="hard")
    with pytest.raises(GraceError, match="gates are"):
        distillation_loss_from_hidden(*inputs(), gates=torch.ones(2))
