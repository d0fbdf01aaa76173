"""What logits in bf16 cost the distillation loss, at several distances of student and teacher: a table in Markdown.

    python tests/benchmarks/logits_dtype.py [--vocabulary 32064] [--width 1024] [--tokens 256]

Teacher and student share a random bf16 head, scaled so that logits have a standard deviation of 3; the student's
hidden states are the teacher's plus noise of a given size, all rounded to bf16. The loss of these very numbers in fp64
is the truth; fp32 and bf16 say what logits are rounded to on the way. On a GPU the fused kernel runs, and both are
timed at the shape given.
"""

import argparse
import time

import torch

from grace.distill import distillation_loss_from_hidden, gated_dkd_sum
from grace.distill.objectives.plain import plain

DISTANCES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
DTYPES = {"fp32": torch.float32, "bf16": None}  # None: the head's own


def problem(distance: float, vocabulary: int, width: int, tokens: int, device: str) -> list[torch.Tensor]:
    """Student's and teacher's hidden states [tokens, width], the head [vocabulary, width] in bf16, labels [tokens]."""
    generator = torch.Generator().manual_seed(0)
    teacher, noise = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    head = torch.randn(vocabulary, width, generator=generator) * 3 / width**0.5
    labels = (teacher @ head.T).softmax(1).multinomial(1, generator=generator).squeeze(1)
    tensors = [(teacher + distance * noise).bfloat16(), head.bfloat16(), teacher.bfloat16(), labels]
    return [tensor.to(device) for tensor in tensors]


def exact(kd: str, student, head, teacher, labels) -> tuple[float, torch.Tensor]:
    """The loss per token or gate, and its gradient to the student's hidden states, in fp64."""
    hidden = student.double().requires_grad_()
    student_logits, teacher_logits = hidden @ head.double().T, teacher.double() @ head.double().T
    if kd == "gated":
        loss, count = gated_dkd_sum(student_logits, teacher_logits, labels)
    else:
        loss, count = plain(student_logits, teacher_logits, labels, temperature=2.0).sum(), len(labels)
    (gradient,) = torch.autograd.grad(loss / count, hidden)
    return float(loss.detach() / count), gradient


def rounded(kd: str, dtype: torch.dtype | None, student, head, teacher, labels, count: float):
    hidden = student.detach().requires_grad_()
    out = distillation_loss_from_hidden(
        hidden, head, teacher, head, labels, mode=kd, ce_weight=0.0, kd_weight=1 / count, logits_dtype=dtype
    )
    (gradient,) = torch.autograd.grad(out["loss"], hidden)
    return float(out["kd_sum"] / out["gate_sum"]), gradient.double()


def milliseconds(dtype: torch.dtype | None, student, head, teacher, labels) -> float:
    """Median of 20 forward and backward passes with a trainable head."""
    times = []
    for _ in range(23):
        leaves = [student.detach().requires_grad_(), head.detach().requires_grad_()]
        torch.cuda.synchronize()
        start = time.perf_counter()
        distillation_loss_from_hidden(*leaves, teacher, head, labels, logits_dtype=dtype)["loss"].backward()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[3:])[10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("vocabulary", 32_064), ("width", 1024), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    shape = vars(parser.parse_args())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{shape}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}\n")
    print(
        "| kd | noise | loss | loss error, fp32 | bf16 | gradient error (relative norm), fp32 | bf16 | cosine, bf16 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kd in ("gated", "plain"):
        for distance in DISTANCES:
            tensors = problem(distance, **shape, device=device)
            loss, gradient = exact(kd, *tensors)
            count = float(gated_dkd_sum(*[tensors[i].double() @ tensors[1].double().T for i in (0, 2)], tensors[3])[1])
            found = {
                name: rounded(kd, dtype, *tensors, count if kd == "gated" else shape["tokens"])
                for name, dtype in DTYPES.items()
            }
            losses = [f"{value / loss - 1:+.2%}" for value, _ in found.values()]
            errors = [f"{float((g - gradient).norm() / gradient.norm()):.2%}" for _, g in found.values()]
            cosine = float(torch.cosine_similarity(found["bf16"][1].flatten(), gradient.flatten(), dim=0))
            print("|", " | ".join([kd, f"{distance:g}", f"{loss:.3g}", *losses, *errors, f"{cosine:.4f}"]), "|")
    if device == "cuda":
        tensors = problem(0.3, **shape, device=device)
        print("\n" + ", ".join(f"{name} {milliseconds(dtype, *tensors):.2f} ms" for name, dtype in DTYPES.items()))


if __name__ == "__main__":
    main()
