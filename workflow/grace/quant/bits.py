"""Codes as a dense stream of bits in int32 words, as compressed-tensors' `pack-quantized` stores them.

Code j of a row is stored as `code + 2^(bits-1)` in bits `bits * j ..` of the row's stream, the first in the lowest bits
(for 4 bits: eight codes a word, code j in bits 4j..4j+3; with 3 bits a code may straddle two words). Eight codes fill
exactly `bits` bytes, so eight bytes are squeezed together at once inside one int64: neighbours first, then pairs, then
fours. Little-endian machines only, like safetensors itself.
"""

import torch

from grace.precision import code_range

_OCTETS = 1 << 15  # eight codes each: a piece stays in the processor's cache
# `bits` bytes at the start of eight, as the fewest elements: strided copies of single bytes are slow.
_LANE = {2: torch.int16, 3: torch.uint8, 4: torch.int32, 8: torch.int64}


def _every(width: int, ones: int, first: int = 0) -> int:
    """An int64 mask with `ones` bits set in every `width` bits, from bit `first` of them on."""
    mask = sum(((1 << ones) - 1) << (at + first) for at in range(0, 64, width))
    return mask - (1 << 64) if mask >> 63 else mask


def words_per_row(columns: int, bits: int) -> int:
    """int32 words that a row of codes fills; the last one may be partly empty."""
    return -(-columns * bits // 32)


def _squeeze(octets: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 [n], each eight codes in eight bytes, to int64 [n] with the codes as stored in the lowest bits."""
    octets = (octets ^ _every(8, 1, bits - 1)).bitwise_and_(_every(8, bits))
    for width in (1, 2, 4):
        octets.bitwise_or_(octets >> (8 - bits) * width).bitwise_and_(_every(16 * width, 2 * bits * width))
    return octets


def _spread(octets: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 [n], each eight stored codes in the lowest bits, to int64 [n] with a stored code in each byte; in place."""
    for width in (4, 2, 1):
        octets.bitwise_or_(octets << (8 - bits) * width).bitwise_and_(_every(8 * width, bits * width))
    return octets


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [out, in], within the range of `bits`, to int32 [out, ceil(in * bits / 32)]; on the CPU."""
    rows, columns = codes.shape
    if columns % 32:
        codes = torch.nn.functional.pad(codes, (0, -columns % 32), value=code_range(bits)[0])
    octets = codes.contiguous().view(torch.int64).flatten()
    lane = _LANE[bits]
    packed = torch.empty(len(octets), bits // lane.itemsize, dtype=lane)
    for begin in range(0, len(octets), _OCTETS):
        piece = _squeeze(octets[begin : begin + _OCTETS], bits).view(lane).view(-1, 8 // lane.itemsize)
        packed[begin : begin + _OCTETS] = piece[:, : packed.shape[1]]
    return packed.view(rows, -1).view(torch.int32)[:, : words_per_row(columns, bits)].contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse: int32 [out, words] to int8 codes [out, columns]; on the CPU."""
    rows, words = packed.shape
    packed = torch.nn.functional.pad(packed, (0, -(-columns // 32) * bits - words))
    lane = _LANE[bits]
    stream = packed.contiguous().view(-1).view(lane).view(-1, bits // lane.itemsize)
    codes = torch.empty(len(stream), 8, dtype=torch.int8)
    for begin in range(0, len(stream), _OCTETS):
        piece = stream[begin : begin + _OCTETS]
        octets = torch.zeros(len(piece), dtype=torch.int64)
        octets.view(lane).view(-1, 8 // lane.itemsize)[:, : piece.shape[1]] = piece
        stored = _spread(octets, bits).view(torch.int8).view(-1, 8)
        torch.add(stored, code_range(bits)[0], out=codes[begin : begin + _OCTETS])
    return codes.view(rows, -1)[:, :columns].contiguous()
