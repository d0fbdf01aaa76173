"""What the cache costs: the batch loss from cached records against the loss from the teacher's own states.

A small share of the records is also kept in full precision. On these, with the same student logits, gated DKD is
computed both ways; the difference of the two batch losses is the cache's error, and its standard error follows from
the records as independent draws: both losses are ratios sum g DKD / sum g, so with R records, G the gates' sum and
e_r = sum over r's tokens of (g DKD)_cached - (g DKD)_exact - error g, it is sqrt(R / (R - 1) sum e_r²) / G.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from grace.distill import gated_dkd_terms, relational_cka_from_gram
from grace.quant.grid import dequantize, largest_scales, quantize
from grace.teacher.reader import CachedTargets, TeacherCache, load_audit
from grace.teacher.sampled import sampled_terms
from grace.world import World


@dataclass
class Audited:
    """A record in full precision.

    Attributes:
        key: the record's key.
        labels: int64 [tokens].
        states: fp32 [tokens, d_T], the teacher's last hidden states.
        grams: per image, fp32 [n, n].
    """

    key: str
    labels: torch.Tensor
    states: torch.Tensor
    grams: list[torch.Tensor]

    def to(self, device: torch.device) -> "Audited":
        """The same on a device, but for the Gram matrices, which are small."""
        return replace(self, labels=self.labels.to(device), states=self.states.to(device))


Student = Callable[[Audited], torch.Tensor]  # the student's logits [tokens, vocab] at the record's supervised tokens


def audited(cache: TeacherCache) -> Iterator[Audited]:
    """The records that the cache keeps in full precision."""
    tensors = load_audit(cache.folder)
    sizes = tensors["sizes"].tolist()
    matrices = [part.view(n, n) for part, n in zip(tensors["grams"].split([n * n for n in sizes]), sizes, strict=True)]
    tokens, images = 0, 0
    for key, count, shown in zip(tensors["keys"], tensors["counts"].tolist(), tensors["images"].tolist(), strict=True):
        part = slice(tokens, tokens + count)
        own = matrices[images : images + shown]
        yield Audited(bytes(key.numpy()).hex(), tensors["labels"][part], tensors["hidden"][part], own)
        tokens, images = tokens + count, images + shown


def rounded_head(head: torch.Tensor, bits: int) -> Student:
    """The teacher with its head [V, d_T] rounded to `bits`, one scale per row: a student at a known distance."""
    scales = largest_scales(head, bits, head.shape[1], "teacher head")
    weight = dequantize(quantize(head, scales, bits), scales).float()
    return lambda record: record.states @ weight.T


def audit(
    cache: TeacherCache,
    students: Mapping[str, Student] | None = None,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta_dkd: float = 4.0,
) -> dict[str, Any]:
    """Measure the cache's error on its audited records.

    Args:
        students: by name; None: the teacher with its head rounded to 4 and to 8 bits, which is one student some way
            off and one close to its teacher.
        temperature: T; a `sampled` cache takes its own.

    Returns: JSON-able: `records`, `tokens`; per student the exact `loss`, the cached loss's `error` with its
        `standard_error` (None for a single record), `relative_error`, and the cosine between the two gradients of the
        student's head; for the Gram matrices `images`, `loss`, `error`, `standard_error`.
    """
    device = World().device  # with a vocabulary of 152,000 a core takes minutes for a few records
    records = [record.to(device) for record in audited(cache)]
    temperature = cache.temperature or temperature
    head = cache.head.to(device).float()
    if students is None:
        students = {f"teacher with its head rounded to {bits} bits": rounded_head(head, bits) for bits in (4, 8)}
    weights = (temperature, alpha, beta_dkd)
    return {
        "records": len(records),
        "tokens": sum(len(record.labels) for record in records),
        "temperature": temperature,
        "gated_dkd": {name: _loss_error(cache, records, student, head, weights) for name, student in students.items()},
        "relational_cka": _gram_error(cache, records),
    }


def _loss_error(
    cache: TeacherCache, records: Sequence[Audited], student: Student, head: torch.Tensor, weights: tuple[float, ...]
) -> dict[str, float | None]:
    exact_sums, cached_sums, gate_sums = [], [], []
    gradients = [torch.zeros_like(head), torch.zeros_like(head)]  # of the sums, by the student's head [V, d]
    for record in records:
        logits = student(record)
        values = []
        for which, loss in enumerate((_exact, _cached)):
            leaf = logits.detach().double().requires_grad_()
            value = loss(leaf, record, cache.batch([record.key]).to(head.device), head, weights)
            value.backward()
            assert leaf.grad is not None, "a leaf has its gradient after backward"
            gradients[which] += leaf.grad.float().T @ record.states
            values.append(value.item())
        exact_sums.append(values[0])
        cached_sums.append(values[1])
        gate_sums.append(cache.gate_sum([record.key]))
    gates = sum(gate_sums)
    if not gates:
        return {"loss": None, "error": None, "standard_error": None, "relative_error": None, "gradient_cosine": None}
    loss = sum(exact_sums) / gates
    error = sum(cached_sums) / gates - loss
    residuals = [c - e - error * g for c, e, g in zip(cached_sums, exact_sums, gate_sums, strict=True)]
    count = len(residuals)
    spread = math.sqrt(count / (count - 1) * sum(r * r for r in residuals)) / gates if count > 1 else None
    cosine = torch.nn.functional.cosine_similarity(*(g.flatten().double() for g in gradients), dim=0)
    return {
        "loss": loss,
        "error": error,
        "standard_error": spread,
        "relative_error": error / loss if loss else None,
        "gradient_cosine": float(cosine),
    }


def _weighted(tckd: torch.Tensor, nckd: torch.Tensor, gates: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    temperature, alpha, beta_dkd = weights
    return temperature**2 * (gates * (alpha * tckd + beta_dkd * nckd)).sum()


def _exact(
    logits: torch.Tensor, record: Audited, targets: CachedTargets, head: torch.Tensor, weights: tuple[float, ...]
) -> torch.Tensor:
    teacher = (record.states @ head.T).double()
    tckd, nckd, gates = gated_dkd_terms(logits, teacher, record.labels, weights[0])
    return _weighted(tckd, nckd, gates, weights)


def _cached(
    logits: torch.Tensor, record: Audited, targets: CachedTargets, head: torch.Tensor, weights: tuple[float, ...]
) -> torch.Tensor:
    if targets.sampled is not None:
        terms = sampled_terms(logits, targets.sampled, record.labels, weights[0])
    else:
        assert targets.hidden is not None, "a cache that samples nothing keeps hidden states"
        teacher = (targets.hidden.float() @ head.T).double()
        terms = gated_dkd_terms(logits, teacher, record.labels, weights[0])[:2]
    return _weighted(*terms, targets.gates, weights)


def _gram_error(cache: TeacherCache, records: Sequence[Audited]) -> dict[str, float | int | None]:
    """The error of `1 - CKA`, averaged over images, for a student whose rows are the teacher's with noise added."""
    generator = torch.Generator().manual_seed(0)
    losses, errors = [], []
    for record in records:
        for matrix, cached in zip(record.grams, cache.batch([record.key]).grams, strict=True):
            values, vectors = torch.linalg.eigh(matrix.double())
            rows = vectors * values.clamp(min=0).sqrt()  # rows with this Gram matrix [n, n]
            noise = torch.randn(rows.shape, dtype=torch.float64, generator=generator) / math.sqrt(len(rows))
            student = rows + 0.3 * noise
            exact = float(relational_cka_from_gram(student, matrix.double()))
            losses.append(exact)
            errors.append(float(relational_cka_from_gram(student, cached.double())) - exact)
    sample = torch.tensor(errors, dtype=torch.float64)
    return {
        "images": len(errors),
        "loss": sum(losses) / len(losses) if losses else None,
        "error": float(sample.mean()) if errors else None,
        "standard_error": float(sample.std() / math.sqrt(len(errors))) if len(errors) > 1 else None,
    }
