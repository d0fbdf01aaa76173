"""How 4-bit weights lie in memory: as compressed-tensors ships them, and as the Triton GEMM reads them.

A *code* is a signed integer in [-8, 7]; a weight is its code times the scale of its group (consecutive inputs of
one output). A *nibble* is a code + 8, in 0..15.

The Triton layout is made of chunks of 128 inputs: int16 [chunks, out, 32], where bits 4i..4i+3 of word j hold the
nibble of input 128 * chunk + 32 * i + j. So

- one output's words of one chunk are 64 consecutive bytes, and neighbouring outputs follow each other: a tile of any
  number of outputs is one contiguous piece of memory, read 16 bytes per thread;
- extracting nibble i of every word gives 32 *consecutive* inputs, so nothing has to be shuffled at run time and the
  activations are read in their natural order;
- two neighbouring int16 words fill a register, and one LOP3 turns them into two bf16 (or fp16) weights at once;
- every slice of 32 inputs lies within one group of 32, 64, 128 or 256: one layout serves them all.

Step sizes lie group by group, the outputs of 16 in the order 0, 8, 1, 9, ..., 7, 15: a thread of a tensor-core product
holds outputs j and j + 8, so it reads both scales as one 32-bit word, the least that an asynchronous copy moves.
"""

import torch

from grace.errors import GraceError

CHUNK = 128  # inputs per chunk
SLICE = 32  # consecutive inputs that one nibble position covers
TILE = 128  # outputs that the widest tile has
GROUPS = (32, 64, 128, 256)  # inputs that share a step size, as both GEMMs take them
ZERO = 8  # nibble of the code 0


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """compressed-tensors' words: int8 codes [out, in] in [-8, 7] -> int32 [out, in/8], lowest input in the lowest bits.

    Raises:
        GraceError: a code out of range, or `in` not a multiple of 8.
    """
    check_codes(codes)
    rows, columns = codes.shape
    if columns % 8:
        raise GraceError(f"int4 packing needs a multiple of 8 inputs, got {columns}; pad the weight with code 0")
    nibbles = (codes.to(torch.uint8) + ZERO & 15).view(rows, columns // 2, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous().view(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`: int32 [out, in/8] -> int8 codes [out, in] in [-8, 7]."""
    pairs = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(packed.shape[0], -1)
    return nibbles.to(torch.int8) - ZERO


def shuffle(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes [out, in] -> the Triton layout, int16 [ceil(in/128), out, 32]; inputs past the end are code 0."""
    check_codes(codes)
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % CHUNK))
    nibbles = (padded.to(torch.int32) + ZERO).view(rows, -1, CHUNK // SLICE, SLICE)
    words = sum(nibbles[:, :, i] << 4 * i for i in range(CHUNK // SLICE))
    return words.to(torch.int16).transpose(0, 1).contiguous()  # to() keeps the low 16 bits


def pair_steps(scales: torch.Tensor) -> torch.Tensor:
    """Step sizes [out, groups] in 16 bits -> [groups, out rounded up to 128], padded with 0,
    each 16 outputs in pairs.
    """
    padded = torch.nn.functional.pad(scales, (0, 0, 0, -scales.shape[0] % TILE)).t()
    return padded.reshape(scales.shape[1], -1, 2, 8).transpose(2, 3).reshape(scales.shape[1], -1).contiguous()


def dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """codes [out, in] times their groups' scales [out, in/group], in fp32, rounded once to `dtype`: [out, in]."""
    rows, groups = scales.shape
    weight = codes.view(rows, groups, -1).float() * scales.float().unsqueeze(-1)
    return weight.to(dtype).view(rows, -1)


def check_codes(codes: torch.Tensor) -> None:
    """Raise a `GraceError` unless `codes` is an int8 matrix with entries in [-8, 7]."""
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise GraceError(f"int4 codes must be an int8 matrix [out, in], got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and (codes.min() < -ZERO or codes.max() >= ZERO):
        raise GraceError(
            f"int4 codes must lie in [-8, 7], got {int(codes.min())} to {int(codes.max())}; quantise again"
        )
