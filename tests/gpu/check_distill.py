"""Are the method's kernels right on this GPU? Against fp64 written from the equations, on inputs chosen to break them.

    python tests/gpu/check_distill.py

Takes under a minute. Prints one line a case with its largest error relative to the bound, and exits with status 1 if
any exceeds it. The same comparisons run in Triton's interpreter in tests/; this is for what only a compiler does.
"""

import sys

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from grace.distill import (
    confidence_gate,
    distillation_loss_from_hidden,
    gated_dkd,
    load_objective,
    objective_names,
    relational_cka,
    relational_cka_sum,
)
from grace.kernels.gated_dkd import loss_rows_, scale_
from grace.quant import LearnedStepSize, lsq_gradients

DEVICE = "cuda"
FAILED: list[str] = []


def report(case: str, **errors: float) -> None:
    """Errors over their bounds; anything but a number of at most 1 fails."""
    bad = [name for name, error in errors.items() if not error <= 1]
    FAILED.extend(f"{case}: {name}" for name in bad)
    print(f"{'FAIL' if bad else 'ok  '} {case}: " + ", ".join(f"{k} {v:.3g}" for k, v in errors.items()), flush=True)


def random(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device=DEVICE)).to(dtype)


def excess(ours: Tensor, exact: Tensor, rtol: float, atol: float = 0.0) -> float:
    """Largest |ours - exact| over atol + rtol |exact|; NaN where one is NaN and the other not."""
    if not torch.equal(ours.isnan(), exact.isnan()):
        return float("nan")
    ours, exact = ours.detach().double(), exact.detach().double()
    gap = (ours - exact).abs() / (atol + rtol * exact.abs())
    return float(gap.nan_to_num(0.0).max()) if gap.numel() else 0.0


def norm_error(ours: Tensor, exact: Tensor, rtol: float) -> float:
    return float((ours.double() - exact.double()).norm() / (rtol * exact.double().norm() + 1e-30))


def by_definition(student, teacher, labels, temperature, alpha, beta_dkd) -> tuple[Tensor, Tensor, Tensor]:
    """CE, gate x DKD and gate of each row in fp64, from the equations."""
    mask = torch.zeros_like(student, dtype=torch.bool).scatter_(1, labels[:, None], True)

    def split(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = logits / temperature
        rest = scaled.masked_fill(mask, -torch.inf).logsumexp(1)
        odds = scaled.gather(1, labels[:, None]).squeeze(1) - rest
        log = torch.nn.functional.logsigmoid
        return log(odds), log(-odds), scaled - rest[:, None]

    (log_q, log_not_q, rest_q), (log_p, log_not_p, rest_p) = split(student), split(teacher)
    tckd = log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)
    nckd = (rest_p.exp() * (rest_p - rest_q)).masked_fill(mask, 0.0).sum(1)
    log_teacher = teacher.log_softmax(1)
    entropy = -(log_teacher.exp() * log_teacher).sum(1)
    gate = torch.exp(-entropy / torch.log(torch.tensor(float(student.shape[1]), dtype=torch.float64)))
    ce = cross_entropy(student, labels, reduction="none")
    return ce, gate * temperature**2 * (alpha * tckd + beta_dkd * nckd), gate


def check_rows() -> None:
    cases = {
        "V 2": (2, 2.0, 1.0, torch.float32), "V 3, T 1": (3, 1.0, 2.0, torch.float32),
        "V 32064 bf16": (32_064, 2.0, 3.0, torch.bfloat16), "V 32003, T 4": (32_003, 4.0, 3.0, torch.float32),
        "V 151936 bf16": (151_936, 2.0, 3.0, torch.bfloat16), "V 5000, T 0.5": (5000, 0.5, 2.0, torch.float32),
        "V 151936, T 1": (151_936, 1.0, 3.0, torch.bfloat16), "V 5000, scale 30": (5000, 2.0, 30.0, torch.float32),
    }  # fmt: skip
    for name, (vocabulary, temperature, scale, dtype) in cases.items():
        labels = torch.tensor([0, vocabulary - 1, 1, vocabulary // 2, 0, vocabulary - 1], device=DEVICE)
        student = random(0, 6, vocabulary, scale=scale, dtype=dtype)
        teacher = random(1, 6, vocabulary, scale=scale, dtype=dtype)
        if vocabulary > 100:
            student[3, -2], teacher[3, -3] = 60.0, 55.0  # far above everything in the first block
            student[4, 0], teacher[4, 0] = 90.0, 80.0  # a label far above the rest
            student[5] = teacher[5]
            student[5, 7] += 0.25  # a student next to its teacher
        padded = torch.full((6, vocabulary + 8), 7.0, device=DEVICE, dtype=dtype)  # rows that are not packed
        padded[:, :vocabulary] = student
        exact = student.double().requires_grad_()
        ce, kd, gate = by_definition(exact, teacher.double(), labels, temperature, 1.5, 4.0)
        (0.3 * ce.sum() + 0.7 * kd.sum()).backward()
        weights = torch.tensor([0.3, 0.7], device=DEVICE)
        got = loss_rows_(padded[:, :vocabulary], teacher, labels, weights, mode="gated", temperature=temperature,
                         alpha=1.5, beta_dkd=4.0)  # fmt: skip
        rounding = 2**-7 if dtype == torch.bfloat16 else 1e-4
        report(
            f"loss rows, {name}", ce=excess(got[0], ce.detach(), 1e-5, 1e-7),
            kd=excess(got[1], kd.detach(), 2e-4, 1e-8),
            gate=excess(got[2], gate, 1e-5), gradient=excess(padded[:, :vocabulary], exact.grad, rounding, 3e-7),
            outside=float((padded[:, vocabulary:] != 7).sum()),
        )  # fmt: skip
    student, teacher = random(2, 6, 3000), random(3, 6, 3000)
    student[2, 2900], teacher[3, 5], student[4, 1] = torch.nan, torch.nan, torch.inf
    labels = torch.tensor([3000, -100, 1, 2, 3, 4], device=DEVICE)
    ones = torch.ones(2, device=DEVICE)
    ce, kd, _ = loss_rows_(student, teacher, labels, ones, mode="gated", temperature=2.0, alpha=1.0, beta_dkd=4.0)
    seen = [bool(row.isnan()) or bool(row.isinf()) for row in ce + kd]
    report("bad rows are not finite, good ones are", rows=0.0 if seen == [True] * 5 + [False] else float("nan"))
    for factor in (1.0, -2.5):
        values = random(4, 7, 50_021, dtype=torch.bfloat16)
        want = values * factor
        scale_(values, torch.tensor(factor, device=DEVICE))
        report(f"scaling by {factor}", error=excess(values, want, 2**-8))


def check_whole_loss() -> None:
    for mixed in (False, True):
        hidden = random(0, 70, 96).requires_grad_()
        head = random(1, 5003, 96, scale=0.3).requires_grad_()
        teacher_hidden, teacher_head = random(2, 70, 128), random(3, 5003, 128, scale=0.3)
        labels = torch.randint(5003, (70,), device=DEVICE)
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            got = distillation_loss_from_hidden(
                hidden, head, teacher_hidden, teacher_head, labels, ce_weight=0.1, kd_weight=torch.tensor(0.2),
                workspace=1 << 20,
            )  # fmt: skip
        (2.5 * got["loss"]).backward()
        ours = hidden.grad.clone(), head.grad.clone()
        h, w = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
        ce, kd, _ = by_definition(h @ w.T, teacher_hidden.double() @ teacher_head.double().T, labels, 2.0, 1.0, 4.0)
        loss = 0.1 * ce.sum() + 0.2 * kd.sum()
        (2.5 * loss).backward()
        report(
            f"whole loss in chunks{', under autocast' if mixed else ''}", loss=excess(got["loss"], loss, 1e-5),
            hidden=norm_error(ours[0], h.grad, 1e-4), head=norm_error(ours[1], w.grad, 1e-4),
        )  # fmt: skip
    frozen = distillation_loss_from_hidden(hidden.detach(), head, teacher_hidden, teacher_head, labels)
    frozen["loss"].backward()
    (only,) = torch.autograd.grad(
        distillation_loss_from_hidden(hidden, head.detach(), teacher_hidden, teacher_head, labels)["loss"], hidden
    )
    report("frozen states, frozen head", finite=0.0 if only.isfinite().all() else float("nan"))
    student, teacher = random(5, 40, 777), random(6, 40, 777)
    want = by_definition(student.double(), teacher.double(), labels[:40] % 777, 2.0, 1.0, 4.0)
    got = gated_dkd(student, teacher, labels[:40] % 777)
    report("gated_dkd", loss=excess(got, want[1].sum() / want[2].sum(), 1e-5))


def check_objectives() -> None:
    """Every objective by autograd from bf16 states, in chunks of a few rows, against whole logits in fp64."""
    hidden, head = (random(i, *shape, dtype=torch.bfloat16) for i, shape in enumerate(((70, 96), (5003, 96))))
    teacher_hidden, teacher_head = random(2, 70, 128, dtype=torch.bfloat16), random(3, 5003, 128, dtype=torch.bfloat16)
    labels = torch.randint(5003, (70,), device=DEVICE)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    teacher = teacher_hidden.double() @ teacher_head.double().T
    for name in objective_names():
        objective = load_objective(name, {"temperature": 2.0})
        student = exact[0] @ exact[1].T
        kd = objective(student, teacher, labels, confidence_gate(teacher)).sum()
        loss = 0.1 * cross_entropy(student, labels, reduction="sum") + 0.2 * kd
        want = torch.autograd.grad(loss, exact)
        for dtype, loss_bound, gradient_bound in ((torch.float32, 1e-5, 1e-2), (None, 1e-2, 5e-2)):
            leaves = [tensor.detach().requires_grad_() for tensor in (hidden, head)]
            got = distillation_loss_from_hidden(
                *leaves, teacher_hidden, teacher_head, labels, mode=objective, ce_weight=0.1, kd_weight=0.2,
                logits_dtype=dtype, workspace=1 << 20,
            )["loss"]  # fmt: skip
            found = torch.autograd.grad(got, leaves)
            report(
                f"{name} by autograd, logits in {dtype or 'bf16'}", loss=excess(got, loss, loss_bound),
                hidden=norm_error(found[0], want[0], gradient_bound),
                head=norm_error(found[1], want[1], gradient_bound),
            )  # fmt: skip


def check_relational_cka() -> None:
    def textbook(x: Tensor, y: Tensor) -> Tensor:
        x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (x, y))
        centre = torch.eye(len(x), dtype=x.dtype, device=DEVICE) - 1 / len(x)
        a, b = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
        return 1 - (a * b).sum() / (a.norm() * b.norm())

    for n, dtype in ((2, torch.float32), (33, torch.bfloat16), (576, torch.bfloat16), (577, torch.float32)):
        student, teacher = random(n, n, 640, dtype=dtype), random(n + 1, n, 768, dtype=dtype)
        exact = student.double().requires_grad_()
        loss = textbook(exact, teacher.double())
        loss.backward()
        ours = student.requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            got = relational_cka(ours, teacher)
        got.backward()
        report(
            f"relational CKA, n {n}", loss=excess(got, loss, 1e-5, 1e-7),
            gradient=norm_error(ours.grad, exact.grad, 1e-2 if dtype == torch.bfloat16 else 1e-4) if n > 2 else 0.0,
        )  # fmt: skip
    students = [
        random(1, 9, 16),
        random(2, 576, 16),
        random(3, 1, 16),
        torch.ones(9, 16, device=DEVICE),
        random(4, 9, 16),
    ]
    teachers = [random(5, 9, 8), random(6, 1, 8).repeat(576, 1), random(7, 1, 8), random(8, 9, 8), random(9, 9, 8)]
    loss, images, skipped = relational_cka_sum(students, teachers)
    want = textbook(students[0].double(), teachers[0].double()) + textbook(students[4].double(), teachers[4].double())
    counted = 0.0 if (int(images), int(skipped)) == (2, 3) else float("nan")
    report("images of several sizes, three of them degenerate", loss=excess(loss, want, 1e-5), counted=counted)


def check_fake_quantisation() -> None:
    for bits, group in ((2, 16), (3, 24), (4, 128), (4, 64), (8, 256)):
        weight = random(bits, 70, 3 * group, scale=0.02)
        weight[0, 0], weight[1, :group], weight[2], weight[3] = 30.0, 0.0, weight[2] * 1e-30, weight[3] * 1e30
        learned = LearnedStepSize.from_weight(weight, bits, group).requires_grad_(False)
        scales = learned.scales
        weight[4, :group] = scales[4, 0].float() * (torch.arange(group, device=DEVICE) - group / 2 - 0.5)
        steps = weight.double().unflatten(1, (3, -1)) / scales.double()[..., None]
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        codes = (weight.unflatten(1, (3, -1)) / scales.float()[..., None]).clamp(lowest, highest).round()
        value = (codes.bfloat16() * scales[..., None]).flatten(1)
        gradient = random(99, 70, 3 * group, dtype=torch.bfloat16)
        inside = (steps > lowest) & (steps < highest)
        grouped = gradient.double().unflatten(1, (3, -1))
        slope = torch.where(inside, steps.clamp(lowest, highest).round() - steps, steps.clamp(lowest, highest))
        want_theta = (grouped * slope).sum(2) * learned.theta.double().exp()
        size = (grouped.abs() * slope.abs()).sum(2) * learned.theta.double().exp()
        got, theta = lsq_gradients(weight, learned.theta, gradient, bits, group)
        in_place = gradient.clone()
        again, _ = lsq_gradients(weight, learned.theta, in_place, bits, group, overwrite=True)
        report(
            f"fake quantisation, {bits} bits, group {group}",
            codes=float((learned.codes(weight) != codes.flatten(1).to(torch.int8)).sum()),
            value=float((learned.fake_quantize(weight) != value).sum()),
            mask=float((got != grouped.where(inside, 0.0).flatten(1)).sum()), in_place=float((again != got).sum()),
            theta=float(((theta - want_theta).abs() / (1e-5 * size + 1e-30)).max()),
        )  # fmt: skip


def main() -> int:
    print(torch.cuda.get_device_name(), torch.__version__)
    check_rows()
    check_whole_loss()
    check_objectives()
    check_relational_cka()
    check_fake_quantisation()
    print(f"{len(FAILED)} failures" + "".join(f"\n  {name}" for name in FAILED))
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
