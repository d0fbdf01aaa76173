"""The `sampled` format: decoupled distillation from 272 bytes per token, unbiased at any vocabulary.

For one supervised token with label y let t and s be the teacher's and the student's logits over T, p^ and q^ their
softmax over the classes other than y. Stored are four fp32 scalars

    l      = log p_y - log(1 - p_y) = t_y - logsumexp_{j != y} t_j     the label's log-odds
    C      = sum_{j != y} p^_j log p^_j                                NCKD's constant
    g      = exp(-H / log V), H the teacher's entropy at T = 1         the gate
    log P  = log(1 - sum of p^ over the head)                          the tail's mass

and 64 entries (id, log p): the head, i.e. the 32 most probable classes other than y, and 32 systematic draws from
p~, which is p^ restricted to the rest and renormalised. TCKD follows from l exactly. NCKD splits exactly into

    sum_head p^ phi(log q^/p^)  +  P phi(log Q/P)  +  P E_{p~}[phi(log q~/p~)],    phi(x) = e^x - 1 - x >= 0,

with Q = 1 - sum_head q^ and q~ the student's renormalised tail: sum_i p_i phi(log q_i/p_i) is the KL divergence
wherever p and q have the same total. The draws make the last term unbiased in value and gradient, and every term
vanishes to second order as the student reaches its teacher, so the noise vanishes with it, and a rounding e of a
stored log p adds e^2 and not e where they agree. An entry is 32 bits: as many as the vocabulary's ids need (18 for
Qwen's 151,936, where 16 would not do), and the rest for log p.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from grace.distill.autograd_rows import TENSORS, autograd_rows_
from grace.distill.chunks import RowLosses, cut_rows, loss_in_chunks
from grace.distill.gated_dkd import entropy_gate
from grace.distill.log_space import at_least_fp32, binary_kl, kl_elements, label_split
from grace.errors import GraceError

HEAD = 32
TAIL = 32
ENTRY_BITS = 32
NATS = 32  # an entry's log p reaches down to -32, where p = 1e-14
LARGEST_VOCABULARY = 2**20  # 12 bits are left for log p: steps of 1/128
_ELEMENTS_AT_ONCE = 2**24


@dataclass
class SampledRecord:
    """What `sampled` keeps of `tokens` supervised tokens.

    Attributes:
        log_odds: fp32 [tokens], l at temperature T.
        negentropy: fp32 [tokens], C at temperature T, in nats.
        gates: fp32 [tokens], at temperature 1.
        log_tail: fp32 [tokens], log P at temperature T; -inf where the head holds every class.
        entries: int32 [tokens, head + tail], an id and a log-probability each (`pack_entries`); the head's
            log-probability is log p^, the tail's is log p~.
        vocabulary: V, which decides how an entry is packed.
    """

    log_odds: torch.Tensor
    negentropy: torch.Tensor
    gates: torch.Tensor
    log_tail: torch.Tensor
    entries: torch.Tensor
    vocabulary: int

    def __len__(self) -> int:
        return len(self.gates)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The five tensors by name, as a shard keeps them."""
        return {name: value for name, value in vars(self).items() if name != "vocabulary"}

    def __getitem__(self, tokens: slice | torch.Tensor) -> "SampledRecord":
        return replace(self, **{name: value[tokens] for name, value in self.tensors().items()})

    def to(self, device: torch.device | str) -> "SampledRecord":
        """The same record on another device."""
        return self.each(lambda tensor: tensor.to(device))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "SampledRecord":
        """The record of changed tensors."""
        return replace(self, **{name: change(value) for name, value in self.tensors().items()})

    @classmethod
    def cat(cls, records: list["SampledRecord"]) -> "SampledRecord":
        """Records one after the other."""
        parts = [record.tensors() for record in records]
        return replace(records[0], **{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def entry_counts(vocabulary: int) -> tuple[int, int]:
    """(head, tail) entries per token: 32 and 32, or every class but the label where 64 entries hold them all."""
    if not 2 <= vocabulary <= LARGEST_VOCABULARY:
        raise GraceError(
            f"cache.format: `sampled` holds vocabularies of 2 to {LARGEST_VOCABULARY} entries, the teacher's has "
            f"{vocabulary}; choose `hidden`"
        )
    others = vocabulary - 1
    return (others, 0) if others <= HEAD + TAIL else (HEAD, TAIL)


def code_bits(vocabulary: int) -> int:
    """Bits of an entry that hold its log p: 14 for 151,936 classes (steps of 1/512 nat), 17 for 32,000 (1/4096)."""
    return ENTRY_BITS - (vocabulary - 1).bit_length()


def pack_entries(ids: torch.Tensor, log_p: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Ids in [0, vocabulary) and log-probabilities, not below -32, as int32 of the same shape."""
    codes = 2 ** code_bits(vocabulary)
    code = (log_p.double() * (-codes / NATS)).round().clamp(0, codes - 1).long()
    packed = ids.long() * codes + code
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_entries(entries: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (int64) and log-probabilities (fp32) of packed entries, same shape."""
    codes = 2 ** code_bits(vocabulary)
    packed = entries.long() & 0xFFFFFFFF
    return packed // codes, (packed % codes).float() * (-NATS / codes)


def encode_sampled(
    teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float, uniforms: torch.Tensor
) -> SampledRecord:
    """Encode teacher logits for labels.

    Args:
        teacher_logits: [tokens, vocab], any float dtype, finite.
        labels: int64 [tokens], in [0, vocab).
        temperature: T > 0, baked into the record.
        uniforms: float64 [tokens] in [0, 1), the offsets of the systematic draws: the record's only randomness.
    """
    rows = max(1, _ELEMENTS_AT_ONCE // teacher_logits.shape[1])
    parts = zip(teacher_logits.split(rows), labels.split(rows), uniforms.split(rows), strict=True)
    return SampledRecord.cat([_encode(logits, y, temperature, u) for logits, y, u in parts])


def _encode(
    teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float, uniforms: torch.Tensor
) -> SampledRecord:
    vocabulary = teacher_logits.shape[1]
    head, tail = entry_counts(vocabulary)
    teacher = teacher_logits.float()
    log_odds, log_p = label_split(teacher, labels, temperature)  # log p^ [tokens, vocab], 0 at the label
    negentropy = (log_p.exp() * log_p).sum(1)
    log_p.scatter_(1, labels[:, None], -torch.inf)
    head_log_p, head_ids = log_p.topk(head)  # [tokens, head]
    entries = pack_entries(head_ids, head_log_p, vocabulary)
    log_tail = torch.full_like(negentropy, -torch.inf)
    if tail:
        rest = log_p.scatter(1, head_ids, -torch.inf)
        log_tail = rest.logsumexp(1)
        rest -= log_tail[:, None]  # log p~
        # fp64: over 150,000 classes an fp32 running sum is off by more than many of its terms
        cumulative = rest.double().exp().cumsum(1)
        every = torch.arange(tail, dtype=torch.float64, device=rest.device)
        points = (uniforms.to(rest.device)[:, None] + every) / tail  # [tokens, tail], in [0, 1)
        points = points.clamp(max=1 - 1e-15) * cumulative[:, -1:]
        tail_ids = torch.searchsorted(cumulative, points, right=True)
        entries = torch.cat([entries, pack_entries(tail_ids, rest.gather(1, tail_ids), vocabulary)], 1)
    return SampledRecord(log_odds, negentropy, entropy_gate(teacher), log_tail, entries, vocabulary)


def sampled_terms(
    student_logits: torch.Tensor, record: SampledRecord, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """TCKD (exact) and NCKD (unbiased) of every token against a record, in nats, not yet times T².

    Args:
        student_logits: [tokens, vocab], any float dtype; copied to fp32 once, so pass the tokens in chunks where that
            matters (`distillation_loss_from_record` does).
        record: of the same tokens.
        labels: int64 [tokens], those that the record was encoded with.
        temperature: T, the one that the record was encoded with.

    Returns: two tensors [tokens], fp32 (fp64 for fp64 logits), differentiable in `student_logits`.
    """
    head, tail = entry_counts(student_logits.shape[1])
    if record.vocabulary != student_logits.shape[1]:
        raise GraceError(
            f"the student's vocabulary has {student_logits.shape[1]} entries and the teacher's {record.vocabulary}; "
            "distil between models of one tokenizer"
        )
    student = at_least_fp32(student_logits)
    s = (student - student.detach().amax(1, keepdim=True)) / temperature  # [tokens, vocab]
    label = labels[:, None]
    ids, log_p = unpack_entries(record.entries, record.vocabulary)
    log_p = log_p.to(s.dtype)
    head_s = s.gather(1, ids[:, :head])  # [tokens, head]
    total = head_s.logsumexp(1)  # of every class but the label, [tokens]
    if tail:
        known = torch.cat([label, ids[:, :head]], 1)
        rest = s.scatter(1, known, -torch.inf).logsumexp(1)  # of the tail, [tokens]
        total = torch.logaddexp(total, rest)
    tckd = binary_kl(record.log_odds.to(s.dtype), s.gather(1, label).squeeze(1) - total)
    nckd = kl_elements(log_p[:, :head], head_s - total[:, None]).sum(1)
    if tail:
        log_tail = record.log_tail.to(s.dtype)
        log_ratio = s.gather(1, ids[:, head:]) - rest[:, None] - log_p[:, head:]  # log q~/p~
        draws = torch.expm1(log_ratio) - log_ratio
        nckd = nckd + kl_elements(log_tail, rest - total) + log_tail.exp() * draws.mean(1)
    return tckd, nckd


def distillation_loss_from_record(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    record: SampledRecord,
    labels: torch.Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta_dkd: float = 4.0,
    mode: Literal["gated", "plain"] = "gated",
    ce_weight: float | torch.Tensor = 1.0,
    kd_weight: float | torch.Tensor = 1.0,
    logits_dtype: torch.dtype | None = torch.float32,
    workspace: int | None = None,
) -> dict[str, torch.Tensor]:
    """`grace.distill.distillation_loss_from_hidden` for a sampled record: same arguments, same four results.

    In mode "plain" the loss is T² KL(p || q) = T² (TCKD + (1 - p_y) NCKD), unbiased like NCKD.
    """
    labels = labels.long()

    def rows_(logits: torch.Tensor, part: slice, weights: torch.Tensor) -> RowLosses:
        taught = record[part]
        gate = taught.gates if mode == "gated" else torch.ones_like(taught.gates)
        loss = partial(_loss, taught, gate, temperature, alpha, beta_dkd, mode)
        return autograd_rows_(logits, labels[part], weights, loss, gate)

    cut = cut_rows(student_head, len(student_hidden), logits_dtype, workspace, TENSORS)
    return loss_in_chunks(student_hidden, student_head, rows_, cut, ce_weight, kd_weight)


def _loss(record, gates, temperature, alpha, beta_dkd, mode, student, labels) -> torch.Tensor:
    """T² times the gated or plain divergence of every token [tokens]."""
    tckd, nckd = sampled_terms(student, record, labels, temperature)
    if mode == "plain":
        alpha, beta_dkd = 1.0, torch.sigmoid(-record.log_odds)
    return temperature**2 * gates * (alpha * tckd + beta_dkd * nckd)
