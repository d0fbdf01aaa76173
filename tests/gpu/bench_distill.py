"""What the method costs on one GPU: fused loss, relational CKA and fake quantisation.

    python tests/gpu/bench_distill.py --out bench_distill.json

Needs one GPU with 80 GB. Everything that a ratio is made of runs in this one process: the GPU's own ceilings (copy
bandwidth, bf16 product), the composed torch form of each loss, and the kernels. Each part is compared with fp64 first
and the script exits with status 1 if an error exceeds its bound. Times are medians over `--repeats` of CUDA events.

Floors are bytes over the measured copy bandwidth plus FLOPs over the measured product:
- loss rows: both bf16 logits read once, one written: 6 bytes per token and class;
- fused loss: the student's three head products and the teacher's one, plus the rows;
- relational CKA: two fp32 Gram products of n^2 d, plus the student's tokens and Gram read and written;
- fake quantisation and gradient: fp32 weight read twice, bf16 weight written, bf16 gradient read: 12 bytes.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import triton
from torch.nn.functional import cross_entropy, kl_div

from grace.distill import distillation_loss_from_hidden, gated_dkd_sum, relational_cka_sum
from grace.kernels import fake_quant
from grace.kernels.gated_dkd import loss_rows_
from grace.quant.step_size import LearnedStepSize, lsq_gradients

TOKENS = 2048
HEADS = {"llava-1.5": (32_064, 4096, 5120), "qwen2-vl": (151_936, 1536, 3584)}  # vocabulary, d_S, d_T
IMAGES, VISUAL, GROUP, LAYERS = 4, 576, 128, 32
LLAVA_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
            "gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}  # fmt: skip
DEVICE = "cuda"


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of `work` on the device, after two runs that are not counted."""
    times = []
    for index in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end))
    return median(times)


def peak_mib(work: Callable[[], object]) -> float:
    """Most memory that `work` holds above what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def random(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device=DEVICE)).to(dtype)


def ceilings(repeats: int) -> dict[str, float]:
    """Copy bandwidth in TB/s (read + write) and bf16 product in TFLOP/s of this GPU, now."""
    source = random(0, 2**29)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), repeats)
    a, b = random(0, 8192, 8192), random(1, 8192, 8192)
    product = milliseconds(lambda: a @ b, repeats)
    return {"copy_tb_s": 2 * source.nbytes / copy / 1e9, "bf16_tflop_s": 2 * 8192**3 / product / 1e9}


def floor_ms(gpu: dict[str, float], bytes_moved: float = 0.0, flops: float = 0.0) -> float:
    return bytes_moved / gpu["copy_tb_s"] / 1e9 + flops / gpu["bf16_tflop_s"] / 1e9


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def composed_gated_dkd(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Sum of gated DKD as public code composes it: probabilities, a one-hot mask, 1 - p under a clamp."""
    student, teacher = student.float(), teacher.float()
    mask = torch.zeros_like(student, dtype=torch.bool).scatter_(1, labels.unsqueeze(1), True)
    p = (teacher / temperature).softmax(1).gather(1, labels.unsqueeze(1))
    q = (student / temperature).softmax(1).gather(1, labels.unsqueeze(1))
    p, q = torch.cat([p, 1 - p], 1), torch.cat([q, 1 - q], 1).clamp_min(1e-8)
    tckd = kl_div(q.log(), p, reduction="none").sum(1)
    rest_p = (teacher / temperature - 1000.0 * mask).softmax(1)
    nckd = kl_div((student / temperature - 1000.0 * mask).log_softmax(1), rest_p, reduction="none").sum(1)
    at_one = teacher.softmax(1)
    gate = torch.exp((at_one * torch.log(at_one + 1e-10)).sum(1) / math.log(student.shape[1]))
    return (gate * temperature**2 * (tckd + 4 * nckd)).sum()


def bench_loss(name: str, gpu: dict[str, float], repeats: int) -> dict[str, float | str]:
    """Gated DKD + CE from hidden states, forward and backward, against composed torch operations."""
    vocabulary, d_s, d_t = HEADS[name]
    hidden = random(0, TOKENS, d_s).requires_grad_()
    head = random(1, vocabulary, d_s, scale=2 * d_s**-0.5).requires_grad_()
    teacher_hidden, teacher_head = random(2, TOKENS, d_t), random(3, vocabulary, d_t, scale=2 * d_t**-0.5)
    labels = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator(DEVICE).manual_seed(4), device=DEVICE)
    weights = {"ce_weight": 1 / TOKENS, "kd_weight": 0.5 / TOKENS}

    def fused() -> None:
        hidden.grad = head.grad = None
        distillation_loss_from_hidden(hidden, head, teacher_hidden, teacher_head, labels, **weights)["loss"].backward()

    def composed() -> None:
        hidden.grad = head.grad = None
        student = hidden @ head.T
        ce = cross_entropy(student.float(), labels, reduction="sum")
        kd = composed_gated_dkd(student, teacher_hidden @ teacher_head.T, labels, 2.0)
        (ce / TOKENS + 0.5 * kd / TOKENS).backward()

    def student_products() -> None:
        logits = hidden.detach() @ head.detach().T
        logits @ head.detach()
        logits.T @ hidden.detach()

    # exactness: bf16 logits as the GEMM makes them, everything after in fp64
    part = slice(0, 128)
    exact_logits = (hidden[part] @ head.T).detach().double().requires_grad_()
    exact_teacher = (teacher_hidden[part] @ teacher_head.T).double()
    kd, gates = gated_dkd_sum(exact_logits, exact_teacher, labels[part])
    exact_loss = cross_entropy(exact_logits, labels[part], reduction="sum") / TOKENS + 0.5 * kd / TOKENS
    exact_loss.backward()
    inputs = hidden[part], head, teacher_hidden[part], teacher_head, labels[part]
    got = distillation_loss_from_hidden(*inputs, **weights, logits_dtype=None)
    hidden.grad = head.grad = None
    got["loss"].backward()
    errors = {
        "loss_error": abs((got["loss"] / exact_loss).item() - 1),
        "gate_error": abs((got["gate_sum"] / gates).item() - 1),
        "hidden_gradient_error": relative(hidden.grad[part], exact_logits.grad @ head.detach().double()),
        "head_gradient_error": relative(head.grad, exact_logits.grad.T @ hidden[part].detach().double()),
    }
    del exact_logits, exact_teacher, exact_loss, kd, got
    hidden.grad = head.grad = None

    fused_ms, products_ms = milliseconds(fused, repeats), milliseconds(student_products, repeats)
    gradients_mib = (hidden.nbytes + head.nbytes) / 2**20
    hidden.grad = head.grad = None
    fused_mib = peak_mib(fused)
    hidden.grad = head.grad = None
    composed_mib = peak_mib(composed)
    composed_ms = milliseconds(composed, max(3, repeats // 4))
    hidden.grad = head.grad = None

    logits, teacher_logits = (hidden @ head.T).detach(), teacher_hidden @ teacher_head.T
    scales = torch.tensor([weights["ce_weight"], weights["kd_weight"]], device=DEVICE)
    settings = {"mode": "gated", "temperature": 2.0, "alpha": 1.0, "beta_dkd": 4.0}
    rows_ms = milliseconds(lambda: loss_rows_(logits, teacher_logits, labels, scales, **settings), repeats)
    rows_floor = floor_ms(gpu, 6.0 * TOKENS * vocabulary)
    flops = 2.0 * TOKENS * vocabulary * (3 * d_s + d_t)
    return {
        "part": f"gated DKD + CE, {name}", "tokens": TOKENS, "vocabulary": vocabulary, "d_s": d_s, "d_t": d_t,
        "fused_ms": fused_ms, "student_products_ms": products_ms, "beyond_student_products_ms": fused_ms - products_ms,
        "composed_ms": composed_ms, "speedup": composed_ms / fused_ms, "floor_ms": rows_floor + floor_ms(gpu, 0, flops),
        "rows_ms": rows_ms, "rows_floor_ms": rows_floor,
        "fused_peak_mib": fused_mib, "fused_peak_beyond_gradients_mib": fused_mib - gradients_mib,
        "composed_peak_mib": composed_mib, **errors,
    }  # fmt: skip


def bench_relational_cka(gpu: dict[str, float], repeats: int) -> dict[str, float | str]:
    """Relational CKA of cached Gram matrices, forward and backward, against the textbook form under autograd."""
    d_s, d_t = 4096, 5120
    students = [random(i, VISUAL, d_s).requires_grad_() for i in range(IMAGES)]
    teachers = [random(9 + i, VISUAL, d_t, dtype=torch.float32) for i in range(IMAGES)]
    rows = [teacher / teacher.norm(dim=1, keepdim=True) for teacher in teachers]
    grams = [x @ x.T for x in rows]

    def textbook(students: list[torch.Tensor], grams: list[torch.Tensor]) -> torch.Tensor:
        losses = []
        for tokens, gram in zip(students, grams, strict=True):
            unit = tokens / tokens.norm(dim=1, keepdim=True)
            centre = torch.eye(VISUAL, dtype=gram.dtype, device=DEVICE) - 1 / VISUAL
            k_s, k_t = centre @ (unit @ unit.T) @ centre, centre @ gram @ centre
            losses.append(1 - (k_s * k_t).sum() / (k_s.norm() * k_t.norm()))
        return torch.stack(losses).sum()

    def fused() -> torch.Tensor:
        for student in students:
            student.grad = None
        loss = relational_cka_sum(students, teacher_grams=grams)[0]
        loss.backward()
        return loss.detach()

    def composed() -> None:
        for student in students:
            student.grad = None
        textbook([student.float() for student in students], grams).backward()

    exact = [student.detach().double().requires_grad_() for student in students]
    exact_loss = textbook(exact, [gram.double() for gram in grams])
    exact_loss.backward()
    loss = fused()
    errors = {
        "loss_error": abs((loss / exact_loss).item() - 1),
        "gradient_error": max(relative(s.grad, e.grad) for s, e in zip(students, exact, strict=True)),
    }
    fused_ms, composed_ms = milliseconds(fused, repeats), milliseconds(composed, repeats)
    moved = IMAGES * (2 * 2 * VISUAL * d_s + 4 * 4 * VISUAL**2)
    return {
        "part": "relational CKA", "images": IMAGES, "visual_tokens": VISUAL, "fused_ms": fused_ms,
        "composed_ms": composed_ms, "speedup": composed_ms / fused_ms, "fused_peak_mib": peak_mib(fused),
        "composed_peak_mib": peak_mib(composed), "floor_ms": floor_ms(gpu, moved, IMAGES * 4.0 * VISUAL**2 * d_s),
        **errors,
    }  # fmt: skip


def bench_fake_quantisation(gpu: dict[str, float], repeats: int) -> dict[str, float | str]:
    """All decoder linears of LLaVA-1.5-7B once: fake quantisation, then LSQ's gradients of a given gradient."""
    layer = []
    for seed, (out_features, in_features) in enumerate(LLAVA_7B.values()):
        weight = random(seed, out_features, in_features, scale=0.02, dtype=torch.float32)
        learned = LearnedStepSize.from_weight(weight, 4, GROUP).requires_grad_(False)
        layer.append((weight, learned, random(50 + seed, out_features, in_features)))
    weights = [(w.clone(), learned, g.clone(), torch.empty_like(g)) for _ in range(LAYERS) for w, learned, g in layer]

    def fused() -> None:
        for weight, learned, gradient, out in weights:
            scales = learned.scales
            fake_quant.fake_quantize(weight, scales, 4, out)
            fake_quant.lsq_gradient_(weight, learned.theta, scales, gradient, 4)

    def composed() -> None:
        for weight, learned, gradient, out in weights[: len(layer)]:
            out.copy_(learned.fake_quantize(weight))
            gradient.copy_(lsq_gradients(weight, learned.theta, gradient, 4, GROUP)[0])

    weight, learned, gradient = layer[0]
    ours = gradient.clone()
    theta = fake_quant.lsq_gradient_(weight, learned.theta, learned.scales, ours, 4)
    want_weight, want_theta = lsq_gradients(weight.double(), learned.theta, gradient.double(), 4, GROUP)
    values_differ = (fake_quant.fake_quantize(weight, learned.scales, 4) != learned.fake_quantize(weight)).sum()
    errors = {
        "values_error": float(values_differ),
        "gradient_error": relative(ours, want_weight.double()),
        "theta_gradient_error": relative(theta, want_theta.double()),
    }
    del want_weight, want_theta
    fused_ms, composed_ms = milliseconds(fused, repeats), LAYERS * milliseconds(composed, repeats)
    count = sum(weight.numel() for weight, *_ in weights)
    return {
        "part": "fake quantisation + gradient, LLaVA-1.5-7B", "weights": count, "fused_ms": fused_ms,
        "composed_ms": composed_ms, "speedup": composed_ms / fused_ms, "fused_peak_mib": peak_mib(fused),
        "floor_ms": floor_ms(gpu, 12.0 * count), **errors,
    }  # fmt: skip


# largest relative error of each comparison: losses in fp32, gradients in bf16, codes exact
BOUNDS = {
    "loss_error": 1e-4, "gate_error": 1e-5, "hidden_gradient_error": 1e-2, "head_gradient_error": 1e-2,
    "gradient_error": 1e-2, "theta_gradient_error": 1e-5, "codes_error": 0.0,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    gpu = ceilings(arguments.repeats)
    parts = []
    for run in (
        lambda: bench_loss("llava-1.5", gpu, arguments.repeats),
        lambda: bench_loss("qwen2-vl", gpu, arguments.repeats),
        lambda: bench_relational_cka(gpu, arguments.repeats),
        lambda: bench_fake_quantisation(gpu, arguments.repeats),
    ):
        parts.append(run())
        torch.cuda.empty_cache()
        print(json.dumps(parts[-1], indent=2), flush=True)
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "repeats": arguments.repeats, "ceilings": gpu, "parts": parts,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    wrong = [
        (part["part"], key, part[key]) for part in parts for key, bound in BOUNDS.items() if part.get(key, 0) > bound
    ]
    for part, key, value in wrong:
        print(f"{part}: {key} is {value:.2e}, bound {BOUNDS[key]:.0e}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
