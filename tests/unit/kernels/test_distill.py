"""The Triton kernels of the method, in Triton's CPU interpreter, against their torch forms in fp64 and by formula.

The interpreter cuts fp32 off to bf16 where a GPU rounds, hence outputs in fp32 or a tolerance of one bf16 step.
"""

import os
import subprocess
import sys

import pytest
import torch
import triton

from grace.distill import from_hidden
from grace.distill.chunk_loss import loss_rows_ as torch_rows_
from grace.distill.relational_cka import _align_, unit_rows
from grace.kernels import fake_quant, gated_dkd, relational_cka
from grace.quant.step_size import LearnedStepSize, lsq_gradients

assert triton.knobs.runtime.interpret, "conftest.py sets TRITON_INTERPRET before triton is first imported"


def logits(seed: int, rows: int, vocabulary: int, scale: float = 3.0, dtype=torch.float32) -> torch.Tensor:
    return (scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("mode", ["gated", "plain", "none"])
@pytest.mark.parametrize(("vocabulary", "temperature", "scale"), [(2, 2.0, 1.0), (160, 1.0, 3.0), (5000, 3.0, 30.0)])
def test_rows_equal_fp64(mode, vocabulary, temperature, scale):
    student, teacher = logits(0, 4, vocabulary, scale), logits(1, 4, vocabulary, scale)
    labels = torch.tensor([0, vocabulary - 1, 1, vocabulary // 2])
    settings = dict(mode=mode, temperature=temperature, alpha=1.5, beta_dkd=4.0)
    exact = student.double()
    weights = torch.tensor([0.3, 0.7])
    want = torch_rows_(exact, teacher.double(), labels, weights.double(), **settings)
    got = gated_dkd.loss_rows_(student, teacher, labels, weights, **settings)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(student.double(), exact, rtol=1e-4, atol=1e-7)


def test_rows_in_bf16_with_given_gates_and_padding():
    student, teacher = logits(2, 3, 300, dtype=torch.bfloat16), logits(3, 3, 300, dtype=torch.bfloat16)
    padded = torch.zeros(3, 320, dtype=torch.bfloat16)
    padded[:, :300] = student
    labels, gates, weights = torch.tensor([5, 299, 0]), torch.tensor([0.4, 0.9, 1.0]), torch.tensor([1.0, 2.0])
    settings = dict(mode="gated", temperature=2.0, alpha=1.0, beta_dkd=4.0, gates=gates)
    exact = student.double()
    want = torch_rows_(exact, teacher.double(), labels, weights.double(), **settings)
    got = gated_dkd.loss_rows_(padded[:, :300], teacher, labels, weights, **settings)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(padded[:, :300].double(), exact, rtol=2**-7, atol=1e-7)
    assert not padded[:, 300:].any()


def test_rows_at_extremes():
    """Logits of +-1e4, confident and wrong tokens, a student equal to its teacher, a student very close to it."""
    teacher = torch.zeros(6, 50)
    teacher[0, 3], teacher[1, 3], teacher[2, 7], teacher[3] = 1e4, -1e4, 1e4, torch.linspace(-1e4, 1e4, 50)
    teacher[4:] = logits(4, 2, 50)
    student = teacher.flip(0).contiguous()
    student[4], student[5] = teacher[4], teacher[5] + 1e-3 * logits(5, 1, 50)[0]
    labels = torch.full((6,), 3)
    settings = dict(mode="gated", temperature=2.0, alpha=1.0, beta_dkd=4.0)
    exact, weights = student.double(), torch.tensor([1.0, 1.0])
    want = torch_rows_(exact, teacher.double(), labels, weights.double(), **settings)
    got = gated_dkd.loss_rows_(student, teacher, labels, weights, **settings)
    assert got[1][4] == 0 and 0 < got[1][5] < 1e-4
    assert torch.isfinite(student).all()
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3 if ours is got[1] else 1e-5, atol=1e-9)
    torch.testing.assert_close(student.double(), exact, rtol=1e-3, atol=1e-6)


def test_bad_rows_are_nan_and_no_rows_are_fine():
    settings = dict(mode="gated", temperature=2.0, alpha=1.0, beta_dkd=4.0)
    student, teacher = logits(6, 4, 40), logits(7, 4, 40)
    student[2, 9] = torch.nan
    labels = torch.tensor([40, -100, 1, 2])
    ce, kd, _ = gated_dkd.loss_rows_(student, teacher, labels, torch.ones(2), **settings)
    assert torch.isnan(ce).tolist() == torch.isnan(kd).tolist() == [True, True, True, False]
    empty = gated_dkd.loss_rows_(student[:0], teacher[:0], labels[:0], torch.ones(2), **settings)
    assert [part.shape for part in empty] == [(0,)] * 3


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 24), (4, 128), (8, 32)])
def test_fake_quantisation_equals_torch(bits, group):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 2 * group, generator=generator)
    weight[0, 0] = 40.0  # clipped
    learned = LearnedStepSize.from_weight(weight, bits, group)
    scales = learned.scales
    weight[1, :group] = scales[1, 0].float() * (torch.arange(group) - 8.5)  # on every rounding boundary
    quantised = fake_quant.fake_quantize(weight, scales, bits, out=torch.empty_like(weight))  # exact in fp32
    assert torch.equal(quantised.bfloat16(), learned.fake_quantize(weight).detach())
    gradient = torch.randn(weight.shape, generator=generator)
    for scale in (False, True):
        want_weight, want_theta = lsq_gradients(weight, learned.theta, gradient, bits, group, scale)
        ours = gradient.clone()
        theta = fake_quant.lsq_gradient_(weight, learned.theta.detach(), scales, ours, bits, scale)
        assert torch.equal(ours, want_weight)
        torch.testing.assert_close(theta, want_theta, rtol=1e-4, atol=1e-4)


def test_lsq_gradient_by_composition():
    """In fp64, autograd through clamp, straight-through rounding and exp gives the same gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 64, generator=generator)
    theta = torch.full((4, 2), 0.25).log()  # a step that bf16 holds exactly
    gradient = torch.randn(4, 64, generator=generator)
    w, t = weight.double().requires_grad_(), theta.double().requires_grad_()
    step = t.exp().repeat_interleave(32, 1)
    clamped = (w / step).clamp(-8, 7)
    (step * (clamped + (clamped.round() - clamped).detach())).backward(gradient.double())
    ours = gradient.bfloat16()
    got = fake_quant.lsq_gradient_(weight, theta, torch.full((4, 2), 0.25).bfloat16(), ours, 4)
    torch.testing.assert_close(ours.double(), w.grad, rtol=2**-7, atol=0)
    torch.testing.assert_close(got.double(), t.grad, rtol=2**-6, atol=2e-2)


def test_fake_quantisation_refuses_layouts():
    weight, scales = torch.zeros(4, 6), torch.ones(4, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="do not divide"):
        fake_quant.fake_quantize(weight, scales, 4)
    with pytest.raises(ValueError, match="contiguous"):
        fake_quant.fake_quantize(torch.zeros(6, 4).T, torch.ones(4, 3, dtype=torch.bfloat16), 4)


@pytest.mark.parametrize(("n", "dtype"), [(2, torch.float32), (64, torch.float32), (100, torch.float16)])
def test_alignment_equals_torch(n, dtype):
    rows = unit_rows(logits(8, 3 * n, 24)).view(3, n, 24)
    centred = rows - rows.mean(1, keepdim=True)
    others = unit_rows(logits(9, 3 * n, 40)).view(3, n, 40)
    others[1] = others[1, 0]  # a Gram without relations between others that have them
    gram = (others @ others.mT).to(dtype)
    student = centred @ centred.mT
    exact = student.double()
    want, valid = _align_(exact, gram.double(), 1e-6)
    got, flag = relational_cka.align_(student, gram, 1e-6)
    assert flag.tolist() == valid.tolist() == [True, False, True]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.double(), exact, rtol=1e-4, atol=1e-6)


def test_degenerate_alignment_is_zero_and_nan_is_seen():
    gram = torch.ones(2, 10, 10)
    student = (torch.eye(10) - 0.1).repeat(2, 1, 1)
    student[1] = torch.nan
    loss, valid = relational_cka.align_(student, gram, 1e-6)
    assert loss.tolist() == [0, 0] and not valid.any() and not student.any()
    loss, valid = relational_cka.align_(torch.full((1, 10, 10), torch.nan), torch.eye(10)[None], 1e-6)
    assert torch.isnan(loss) and valid


@pytest.mark.parametrize("factor", [1.0, -2.5, float("nan")])
def test_scaling_in_place(factor):
    values = logits(4, 3, 7001)
    want = values * factor
    gated_dkd.scale_(values, torch.tensor(factor))
    torch.testing.assert_close(values, want, equal_nan=True)


@pytest.mark.parametrize("mode", ["gated", "plain", "none"])
def test_whole_loss_through_the_kernel(monkeypatch, mode):
    """The chunked loss with the kernel in place of its torch rows: what runs on a GPU."""
    hidden, head = logits(0, 9, 6, 1.0).requires_grad_(), logits(1, 30, 6, 1.0).requires_grad_()
    teacher = logits(2, 9, 8, 1.0), logits(3, 30, 8, 1.0)
    labels = torch.arange(9)
    settings = dict(mode=mode, ce_weight=torch.tensor(0.2), kd_weight=0.3, workspace=1000)
    results = []
    for rows in (torch_rows_, gated_dkd.loss_rows_):
        monkeypatch.setattr(from_hidden, "loss_rows_", rows)
        losses = from_hidden.distillation_loss_from_hidden(hidden, head, *teacher, labels, **settings)
        results.append([*losses.values(), *torch.autograd.grad(losses["loss"], (hidden, head))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from grace.kernels import fake_quant, gated_dkd, relational_cka

def build(kernel, types, **constants):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    print(kernel.__name__, len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))

fp32 = dict.fromkeys(("temperature", "alpha", "beta_dkd", "inverse_log_vocabulary", "qn", "qp", "factor"), "fp32")
out = ("gates", "weights", "ce_out", "kd_out", "gate_out", "thetas", "theta_gradients", "means", "mean", "scalars")
fp32 |= dict.fromkeys((*out, "partials"), "*fp32")
i32 = dict.fromkeys(("student_stride", "teacher_stride", "vocabulary", "groups", "n"), "i32")
rows = fp32 | i32 | {"student": "*bf16", "teacher": "*bf16", "labels": "*i64"}
for distil, plain in ((True, False), (True, True), (False, False)):
    build(gated_dkd._loss_rows, rows, DISTIL=distil, PLAIN=plain, GIVEN_GATES=False, SQUARE=plain, BLOCK=256)
build(gated_dkd._scale, {"values": "*bf16", "factor": "*fp32", "count": "i32"}, BLOCK=256)
groups = {"GROUP": 128, "GROUPS": 4, "WIDTH": 128}
weights = fp32 | i32 | {"weights": "*fp32", "scales": "*bf16", "out": "*bf16", "gradients": "*bf16"}
build(fake_quant._quantize, weights, **groups)
build(fake_quant._lsq_gradient, weights, **groups)
grams = fp32 | i32 | {"student": "*fp32", "teacher": "*fp16"}
build(relational_cka._hsic, grams, TILE=16)
build(relational_cka._gradient, grams, TILE=16)
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter takes Python that the compiler refuses; compiling for sm_90 needs no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
