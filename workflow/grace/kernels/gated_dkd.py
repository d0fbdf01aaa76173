"""Triton: losses of each row of logits, and their gradient written over the student's logits.

One program per row, two passes over its two rows of logits. The first keeps online softmax statistics of the classes
other than the label, at T = 1 and at T, from which CE, TCKD, gate and all normalisers follow as scalars (log-odds of
the label against the rest: no `1 - p` is ever computed from p). The second reads both rows again, adds up NCKD, and
stores the gradient over the student's logits. Traffic: 4 bytes read twice (the second time partly from L2) and 2
written per bf16 pair of logits, against about 100 for composed operations.

Formulas: `grace.distill.rows`, the torch form that this is tested against.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # classes per step of a program


@triton.jit
def _log_sigmoid(x):
    """log(1 / (1 + e^-x)), to full relative precision where it is close to 0."""
    e = tl.exp(-tl.abs(x))
    log1p = tl.where(e < 1e-3, e * (1.0 - e * (0.5 - e * (1.0 / 3.0))), tl.log(1.0 + e))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def _kl_element(p, q, d):
    """p (e^d - 1 - d) for q = p e^d: a term of KL(p || q) that is never negative."""
    series = 0.5 * d * d * (1.0 + d * (1 / 3.0) * (1.0 + d * (1 / 4.0) * (1.0 + d * (1 / 5.0) * (1.0 + d * (1 / 6.0)))))
    return tl.where(tl.abs(d) < 0.125, p * series, q - p - p * d)


@triton.jit
def _binary_kl(log_odds_p, log_odds_q):
    log_p, log_not_p = _log_sigmoid(log_odds_p), _log_sigmoid(-log_odds_p)
    log_q, log_not_q = _log_sigmoid(log_odds_q), _log_sigmoid(-log_odds_q)
    label = _kl_element(tl.exp(log_p), tl.exp(log_q), log_q - log_p)
    return label + _kl_element(tl.exp(log_not_p), tl.exp(log_not_q), log_not_q - log_not_p)


@triton.jit
def _loss_rows(
    student, teacher, labels, gates, weights, ce_out, kd_out, gate_out,
    student_stride, teacher_stride, vocabulary, temperature, alpha, beta_dkd, inverse_log_vocabulary,
    DISTIL: tl.constexpr, PLAIN: tl.constexpr, GIVEN_GATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    label = tl.load(labels + row)
    # a label outside the vocabulary must not be read; it makes the row NaN instead
    inside = (label >= 0) & (label < vocabulary)
    label_student = tl.load(student + label, mask=inside, other=float("nan")).to(tl.float32)
    inverse_t = 1.0 / temperature

    # statistics of the classes other than the label, relative to their largest logit
    s_max, t_max = -float("inf"), -float("inf")
    s_sum = tl.zeros([BLOCK], tl.float32)  # sum of e^x, student
    s_sum_t = tl.zeros([BLOCK], tl.float32)  # sum of e^(x/T), student
    t_sum = tl.zeros([BLOCK], tl.float32)
    t_sum_t = tl.zeros([BLOCK], tl.float32)
    t_moment = tl.zeros([BLOCK], tl.float32)  # sum of x e^x, teacher: for its entropy
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        valid = (columns < vocabulary) & (columns != label)
        s = tl.load(student + columns, mask=valid, other=-float("inf")).to(tl.float32)
        s_new = tl.maximum(s_max, tl.max(s, 0))
        s_shift = tl.where(valid, s - s_new, 0.0)
        s_sum = s_sum * tl.exp(s_max - s_new) + tl.where(valid, tl.exp(s_shift), 0.0)
        if DISTIL:
            s_sum_t = s_sum_t * tl.exp((s_max - s_new) * inverse_t) + tl.where(valid, tl.exp(s_shift * inverse_t), 0.0)
            t = tl.load(teacher + columns, mask=valid, other=-float("inf")).to(tl.float32)
            t_new = tl.maximum(t_max, tl.max(t, 0))
            t_shift = tl.where(valid, t - t_new, 0.0)
            if not PLAIN and not GIVEN_GATES:
                t_scale = tl.exp(t_max - t_new)
                # the moment is relative to the maximum, which may have moved; before the first class it has none
                t_moved = tl.where(t_max > -float("inf"), t_max - t_new, 0.0)
                e = tl.where(valid, tl.exp(t_shift), 0.0)
                t_moment = (t_moment + t_sum * t_moved) * t_scale + e * t_shift
                t_sum = t_sum * t_scale + e
            t_sum_t = t_sum_t * tl.exp((t_max - t_new) * inverse_t) + tl.where(valid, tl.exp(t_shift * inverse_t), 0.0)
            t_max = t_new
        s_max = s_new

    s_normaliser = tl.log(tl.sum(s_sum, 0))
    s_odds = label_student - s_max - s_normaliser  # log-odds of the label at T = 1
    tl.store(ce_out + row, -_log_sigmoid(s_odds))
    ce_weight = tl.load(weights)
    not_r = ce_weight * tl.exp(_log_sigmoid(-s_odds))  # ce_weight (1 - r_y)
    label_gradient = -not_r
    # defaults of a row without distillation
    s_normaliser_t, t_normaliser_t, kd_weight_others, label_shift, kd_factor = 0.0, 0.0, 0.0, 0.0, 0.0
    tckd, gate, beta_row = 0.0, 0.0, 0.0
    if DISTIL:
        label_teacher = tl.load(teacher + label, mask=inside, other=float("nan")).to(tl.float32)
        s_normaliser_t = tl.log(tl.sum(s_sum_t, 0))
        t_normaliser_t = tl.log(tl.sum(t_sum_t, 0))
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
                t_odds = label_teacher - t_max - tl.log(t_total)
                log_y, log_not_y = _log_sigmoid(t_odds), _log_sigmoid(-t_odds)
                rest_entropy = tl.log(t_total) - tl.sum(t_moment, 0) / t_total
                entropy = tl.exp(log_not_y) * (rest_entropy - log_not_y) - tl.exp(log_y) * log_y
                gate = tl.exp(-entropy * inverse_log_vocabulary)
        kd_factor = gate * temperature * temperature
        kd_weight = tl.load(weights + 1) * gate * temperature
        kd_weight_others = kd_weight * beta_row
        label_shift = kd_weight * alpha * (q * not_p - p * not_q)  # c alpha (q - p)
        label_gradient += label_shift

    s_total = tl.sum(s_sum, 0)
    nckd = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        present = columns < vocabulary
        valid = present & (columns != label)
        s = tl.load(student + columns, mask=present, other=0.0).to(tl.float32)
        gradient = not_r * (tl.exp(tl.where(valid, s - s_max, 0.0)) / s_total)
        if DISTIL:
            t = tl.load(teacher + columns, mask=present, other=0.0).to(tl.float32)
            log_q = tl.where(valid, (s - s_max) * inverse_t - s_normaliser_t, 0.0)
            log_p = tl.where(valid, (t - t_max) * inverse_t - t_normaliser_t, 0.0)
            q_rest, p_rest = tl.exp(log_q), tl.exp(log_p)
            nckd += tl.where(valid, _kl_element(p_rest, q_rest, log_q - log_p), 0.0)
            gradient += kd_weight_others * (q_rest - p_rest) - label_shift * q_rest
        gradient = tl.where(columns == label, label_gradient, gradient)
        tl.store(student + columns, gradient.to(student.dtype.element_ty), mask=present)
    if DISTIL:
        tl.store(kd_out + row, kd_factor * (alpha * tckd + beta_row * tl.sum(nckd, 0)))
    else:
        tl.store(kd_out + row, 0.0)
    tl.store(gate_out + row, gate)


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
    """As `grace.distill.rows.loss_rows_`, in fp32 whatever the dtype of the logits, without waiting for the device.

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
        DISTIL=distil, PLAIN=mode == "plain", GIVEN_GATES=gates is not None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=8,
    )  # fmt: skip
    return ce, kd, gate
