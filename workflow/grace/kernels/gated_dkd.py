"""Triton: losses of each row of logits, and their gradient written over the student's logits.

One program per row, two passes over its two rows of logits. The first sums the softmax of the classes other than the
label, at T = 1 and at T, from which CE, TCKD, gate and all normalisers follow as scalars (log-odds of the label
against the rest: no `1 - p` is ever computed from p). The second reads both rows again, adds up NCKD, and stores the
gradient over the student's logits. Traffic: 4 bytes read twice and 2 written per bf16 pair of logits, against about
100 for composed operations.

Formulas: `grace.distill.chunk_loss`, the torch form that this is tested against.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 1024, 8  # classes per step of a program
LOG2_E = tl.constexpr(math.log2(math.e))
FARTHEST = tl.constexpr(16.0)  # nats: an exponent of this size costs e^x 1e-6 of its value


@triton.jit
def _log_sigmoid(x):
    """log(1 / (1 + e^-x)), to full relative precision where it is close to 0."""
    e = tl.exp(-tl.abs(x))
    log1p = tl.where(e < 1e-3, e * (1.0 - e * (0.5 - e * (1.0 / 3.0))), tl.log(1.0 + e))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def _kl_element(p, q, d):
    """p (e^d - 1 - d) for q = p e^d: a term of KL(p || q) that is never negative."""
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720)))))
    return tl.where(tl.abs(d) < 0.125, p * series, q - p - p * d)


@triton.jit
def _binary_kl(log_odds_p, log_odds_q):
    log_p, log_not_p = _log_sigmoid(log_odds_p), _log_sigmoid(-log_odds_p)
    log_q, log_not_q = _log_sigmoid(log_odds_q), _log_sigmoid(-log_odds_q)
    label = _kl_element(tl.exp(log_p), tl.exp(log_q), log_q - log_p)
    return label + _kl_element(tl.exp(log_not_p), tl.exp(log_not_q), log_not_q - log_not_p)


@triton.jit
def _others(row, start, label, vocabulary, BLOCK: tl.constexpr):
    """One block of a row of logits, fp32 [BLOCK]; -inf at the label and past the end."""
    columns = start + tl.arange(0, BLOCK)
    logits = tl.load(row + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
    return tl.where(columns == label, -float("inf"), logits)


@triton.jit
def _exponentials(shifted, inverse_t, SQUARE: tl.constexpr):
    """e^x and e^(x/T); at T = 2 the first is the second's square."""
    at_t = tl.exp2(shifted * (inverse_t * LOG2_E))
    return at_t * at_t if SQUARE else tl.exp2(shifted * LOG2_E), at_t


@triton.jit
def _loss_rows(
    student, teacher, labels, gates, weights, ce_out, kd_out, gate_out,
    student_stride, teacher_stride, vocabulary, temperature, alpha, beta_dkd, inverse_log_vocabulary,
    DISTIL: tl.constexpr, PLAIN: tl.constexpr, GIVEN_GATES: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    label = tl.load(labels + row)
    # a label outside the vocabulary must not be read; it makes the row NaN instead
    inside = (label >= 0) & (label < vocabulary)
    label_student = tl.load(student + label, mask=inside, other=float("nan")).to(tl.float32)
    inverse_t = 1.0 / temperature

    # Sums over the classes other than the label, relative to the largest logit of the first block: lanes then never
    # wait for one another. Where a later logit is too far above it, the pass is done again relative to the largest.
    farthest = FARTHEST * tl.minimum(temperature, 1.0)
    s_from, t_from = tl.max(_others(student, 0, label, vocabulary, BLOCK), 0), 0.0
    if DISTIL:
        t_from = tl.max(_others(teacher, 0, label, vocabulary, BLOCK), 0)
    s_max, t_max = s_from, t_from
    s_sum = tl.zeros([BLOCK], tl.float32)  # sum of e^x, student
    s_sum_t = tl.zeros([BLOCK], tl.float32)  # sum of e^(x/T), student
    t_sum = tl.zeros([BLOCK], tl.float32)
    t_sum_t = tl.zeros([BLOCK], tl.float32)
    t_moment = tl.zeros([BLOCK], tl.float32)  # sum of x e^x, teacher: for its entropy
    again = tl.full((), 1, tl.int32)
    while again > 0:
        s_top = tl.full([BLOCK], -float("inf"), tl.float32)
        t_top = tl.full([BLOCK], -float("inf"), tl.float32)
        s_sum, s_sum_t, t_sum = tl.zeros_like(s_sum), tl.zeros_like(s_sum), tl.zeros_like(s_sum)
        t_sum_t, t_moment = tl.zeros_like(s_sum), tl.zeros_like(s_sum)
        for start in range(0, vocabulary, BLOCK):
            s = _others(student, start, label, vocabulary, BLOCK)
            s_top = tl.maximum(s_top, s)
            if DISTIL:
                at_one, at_t = _exponentials(s - s_from, inverse_t, SQUARE)
                s_sum += at_one
                s_sum_t += at_t
                t = _others(teacher, start, label, vocabulary, BLOCK)
                t_top = tl.maximum(t_top, t)
                at_one, at_t = _exponentials(t - t_from, inverse_t, SQUARE)
                t_sum_t += at_t
                if not PLAIN and not GIVEN_GATES:
                    t_sum += at_one
                    t_moment += tl.where(at_one > 0, at_one * (t - t_from), 0.0)
            else:
                s_sum += tl.exp2((s - s_from) * LOG2_E)
        s_max, t_max = tl.max(s_top, 0), tl.max(t_top, 0)
        far = s_max - s_from > farthest
        if DISTIL:
            far = far | (t_max - t_from > farthest)
        again = far.to(tl.int32)
        s_from = tl.where(far, s_max, s_from)
        t_from = tl.where(far, t_max, t_from)

    s_total = tl.sum(s_sum, 0)
    s_odds = label_student - s_from - tl.log(s_total)  # log-odds of the label at T = 1
    tl.store(ce_out + row, -_log_sigmoid(s_odds))
    ce_weight = tl.load(weights)
    not_r = ce_weight * tl.exp(_log_sigmoid(-s_odds))  # ce_weight (1 - r_y)
    label_gradient = -not_r
    # defaults of a row without distillation
    s_normaliser_t, t_normaliser_t, kd_weight_others, label_shift, kd_factor = 0.0, 0.0, 0.0, 0.0, 0.0
    tckd, gate, beta_row = 0.0, 0.0, 0.0
    if DISTIL:
        label_teacher = tl.load(teacher + label, mask=inside, other=float("nan")).to(tl.float32)
        s_normaliser_t = tl.log(tl.sum(s_sum_t, 0)) + (s_from - s_max) * inverse_t  # relative to the largest logit
        t_normaliser_t = tl.log(tl.sum(t_sum_t, 0)) + (t_from - t_max) * inverse_t
        s_odds_t = (label_student - s_max) * inverse_t - s_normaliser_t
        t_odds_t = (label_teacher - t_max) * inverse_t - t_normaliser_t
        tckd = _binary_kl(t_odds_t, s_odds_t)
        p, not_p = tl.exp(_log_sigmoid(t_odds_t)), tl.exp(_log_sigmoid(-t_odds_t))
        q, not_q = tl.exp(_log_sigmoid(s_odds_t)), tl.exp(_log_sigmoid(-s_odds_t))
        if PLAIN:
            gate, beta_row = 1.0, not_p  # KL = TCKD + (1 - p) NCKD
        else:
            beta_row = beta_dkd
            if GIVEN_GATES:
                gate = tl.load(gates + row).to(tl.float32)
            else:
                t_total = tl.sum(t_sum, 0)
                t_odds = label_teacher - t_from - tl.log(t_total)
                log_y, log_not_y = _log_sigmoid(t_odds), _log_sigmoid(-t_odds)
                rest_entropy = tl.log(t_total) - tl.sum(t_moment, 0) / t_total
                entropy = tl.exp(log_not_y) * (rest_entropy - log_not_y) - tl.exp(log_y) * log_y
                gate = tl.exp(-entropy * inverse_log_vocabulary)
        kd_factor = gate * temperature * temperature
        kd_weight = tl.load(weights + 1) * gate * temperature
        kd_weight_others = kd_weight * beta_row
        label_shift = kd_weight * alpha * (q * not_p - p * not_q)  # c alpha (q - p)
        label_gradient += label_shift

    # e^((x - largest) / T) times these are the probabilities among the other classes
    s_scale_t, t_scale_t = tl.exp(-s_normaliser_t), tl.exp(-t_normaliser_t)
    r_scale = not_r * tl.exp(s_max - s_from) / s_total
    nckd = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        present = columns < vocabulary
        s = tl.load(student + columns, mask=present, other=0.0).to(tl.float32)
        # the label's own logit may be far above the others'
        s_shifted = tl.minimum(s - s_max, 0.0)
        if DISTIL:
            t = tl.load(teacher + columns, mask=present, other=0.0).to(tl.float32)
            at_one, at_t = _exponentials(s_shifted, inverse_t, SQUARE)
            q_rest = at_t * s_scale_t
            t_shifted = tl.minimum(t - t_max, 0.0)
            p_rest = tl.exp2(t_shifted * (inverse_t * LOG2_E)) * t_scale_t
            d = (s_shifted - t_shifted) * inverse_t - (s_normaliser_t - t_normaliser_t)  # log q^ / p^
            nckd += tl.where(present & (columns != label), _kl_element(p_rest, q_rest, d), 0.0)
            gradient = at_one * r_scale + kd_weight_others * (q_rest - p_rest) - label_shift * q_rest
        else:
            gradient = tl.exp2(s_shifted * LOG2_E) * r_scale
        gradient = tl.where(columns == label, label_gradient, gradient)
        tl.store(student + columns, gradient.to(student.dtype.element_ty), mask=present)
    if DISTIL:
        tl.store(kd_out + row, kd_factor * (alpha * tckd + beta_row * tl.sum(nckd, 0)))
    else:
        tl.store(kd_out + row, 0.0)
    tl.store(gate_out + row, gate)


@triton.jit
def _scale(values, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(values + offsets, mask=offsets < count).to(tl.float32) * by
        tl.store(values + offsets, scaled.to(values.dtype.element_ty), mask=offsets < count)


def scale_(values: Tensor, factor: Tensor) -> None:
    """`values *= factor`, a scalar on the device. A factor of 1, the usual one, costs no pass and no waiting."""
    _scale[(triton.cdiv(values.numel(), 16384),)](values, factor, values.numel(), BLOCK=16384, num_warps=8)


def loss_rows_(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    *,
    mode: str,
    temperature: float,
    alpha: float,
    beta_dkd: float,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `grace.distill.chunk_loss.loss_rows_`, in fp32 whatever the dtype of the logits, without waiting for the
    device.

    Rows must be contiguous along the vocabulary. A label outside it, or a NaN among the logits, makes the row's
    losses and gradient NaN.
    """
    rows, vocabulary = student_logits.shape
    ce, kd, gate = torch.empty(3, rows, dtype=torch.float32, device=student_logits.device).unbind()
    if rows == 0:
        return ce, kd, gate
    distil = mode != "none"
    teacher = teacher_logits if distil else student_logits
    _loss_rows[(rows,)](
        student_logits, teacher, labels, gates if gates is not None else labels, weights, ce, kd, gate,
        student_logits.stride(0), teacher.stride(0), vocabulary,
        float(temperature), 1.0 if mode == "plain" else float(alpha), float(beta_dkd), 1.0 / math.log(vocabulary),
        DISTIL=distil, PLAIN=mode == "plain", GIVEN_GATES=gates is not None, SQUARE=temperature == 2,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=_WARPS,
    )  # fmt: skip
    return ce, kd, gate
