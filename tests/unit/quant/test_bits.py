"""The packed bit stream, against its definition and against compressed-tensors' own functions."""

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.quant.bits import pack_codes, unpack_codes, words_per_row


def random_codes(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8, generator=generator)


def stream_of(words, bits, columns):
    """Codes from one row of int32 words, bit by bit."""
    stream = sum((int(word) & 0xFFFFFFFF) << 32 * place for place, word in enumerate(words))
    return [(stream >> bits * column) % 2**bits - 2 ** (bits - 1) for column in range(columns)]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 150), st.integers(0, 2**31))
def test_packing_is_its_definition_and_the_library_s(bits, rows, columns, seed):
    codes = random_codes(bits, rows, columns, seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, words_per_row(columns, bits))
    assert [stream_of(row, bits, columns) for row in packed] == codes.tolist()
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


def test_pieces_do_not_show():
    """More codes than are handled at once."""
    codes = random_codes(3, 70, 8192, 0)
    packed = pack_codes(codes, 3)
    assert torch.equal(packed, pack_to_int32(codes, 3))
    assert torch.equal(unpack_codes(packed, 3, 8192), codes)


def test_four_bits_by_hand():
    """Element j of each eight in bits 4j..4j+3, stored as code + 8."""
    assert pack_codes(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1]], dtype=torch.int8), 4).item() == 0x76543210
    assert pack_codes(torch.tensor([[7, 0, 0, 0, 0, 0, 0, 7]], dtype=torch.int8), 4).item() == 0xF888888F - 2**32
