"""How hidden states and Gram matrices are kept: pure functions of tensors, exact inverses up to the stated rounding.

`hidden` is the teacher's last hidden state (after the final norm, as the head reads it) in bf16 and needs no code.
"""

import torch

HIDDEN_GROUP = 32


def encode_int8(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [tokens, d] as int8 codes [tokens, d] and bf16 scales [tokens, ceil(d / 32)].

    A group's scale is its largest magnitude over 127. The codes are taken against the rounded scale, so rounding it
    costs at most half a step at the largest value.
    """
    tokens, d = states.shape
    groups = -(-d // HIDDEN_GROUP)
    padded = torch.nn.functional.pad(states.float(), (0, groups * HIDDEN_GROUP - d))
    grouped = padded.view(tokens, groups, HIDDEN_GROUP)
    scales = (grouped.abs().amax(2) / 127).to(torch.bfloat16)
    step = scales.float()[:, :, None]
    codes = torch.where(step > 0, grouped / step, 0).round().clamp(-127, 127)
    return codes.flatten(1)[:, :d].to(torch.int8).contiguous(), scales


def decode_int8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The states [tokens, d] that `encode_int8` kept."""
    wide = scales.float().repeat_interleave(HIDDEN_GROUP, 1)[:, : codes.shape[1]]
    return (codes.float() * wide).to(dtype)


def encode_gram(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """A symmetric matrix [n, n] as int8 upper triangle, fp16 row scales and diagonal, and an fp32 offset.

    K_ij (i < j) is kept as code * s_i s_j + offset, the offset being the triangle's mean: visual tokens of a trained
    model share a direction, and at a mean cosine of 0.9 most of int8's range would be spent on the constant, which
    double centring removes anyway. With r_i the largest magnitude of row i without the diagonal and the offset,
    s_i = sqrt(r_i / 127), so no entry is out of range: |K_ij| <= min(r_i, r_j) <= sqrt(r_i r_j).

    Returns: codes int8 [n (n - 1) / 2] (row by row), scales fp16 [n], diagonal fp16 [n], offset fp32 [1].
    """
    n = len(matrix)
    i, j = torch.triu_indices(n, n, 1, device=matrix.device)
    values = matrix.float()[i, j]
    offset = values.mean() if n > 1 else values.sum()
    rest = matrix.float() - offset
    rest.fill_diagonal_(0)
    scales = (rest.abs().amax(1) / 127).double().sqrt().to(torch.float16)
    step = scales.float()[i] * scales.float()[j]
    codes = torch.where(step > 0, (values - offset) / step, 0).round().clamp(-127, 127).to(torch.int8)
    return {
        "codes": codes,
        "scales": scales,
        "diagonal": matrix.diagonal().to(torch.float16),
        "offset": offset.reshape(1),
    }


def decode_gram(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The symmetric matrix fp32 [n, n] that `encode_gram` kept."""
    n = len(parts["scales"])
    scales = parts["scales"].float()
    i, j = torch.triu_indices(n, n, 1, device=scales.device)
    upper = torch.zeros(n, n, device=scales.device)
    upper[i, j] = parts["codes"].float() * scales[i] * scales[j] + parts["offset"]
    return upper + upper.T + torch.diag(parts["diagonal"].float())
