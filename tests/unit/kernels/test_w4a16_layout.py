"""The layouts of 4-bit weights and the CPU product: bit-exact packing, and products against float64."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grace.errors import GraceError
from grace.kernels import cpu
from grace.kernels.w4a16_layout import CHUNK, SLICE, ZERO, dequantise, pack_int4, pair_steps, shuffle, unpack_int4
from grace.kernels.w4a16_table import DENSE, GPU, HOPPER_FROM, Tile, choose, read_table, rows_key, rule, with_entry


def unshuffle(words: torch.Tensor, in_features: int) -> torch.Tensor:
    """The inverse of `shuffle`: int16 [chunks, out, 32] -> int8 codes [out, in_features]."""
    chunks, rows, _ = words.shape
    slices = [(words.to(torch.int32) >> 4 * i & 15) - ZERO for i in range(CHUNK // SLICE)]
    codes = torch.stack(slices, dim=2).to(torch.int8).permute(1, 0, 2, 3)  # [out, chunks, 4, 32]
    return codes.reshape(rows, chunks * CHUNK)[:, :in_features].contiguous()


def problem(out: int, inputs: int, group: int, rows: int, seed: int, dtype: torch.dtype):
    """codes, scales, x and the float64 product of random data."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (out, inputs), dtype=torch.int8, generator=generator)
    scales = (torch.rand(out, inputs // group, generator=generator) * 0.1 + 0.02).bfloat16()
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    return codes, scales, x, x.double() @ dequantise(codes, scales, torch.float64).T


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_is_compressed_tensors_own_and_goes_back(rows, eighths, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, 8 * eighths), dtype=torch.int8, generator=generator)
    packed = pack_int4(codes)
    assert torch.equal(packed, pack_to_int32(codes, 4))
    assert torch.equal(unpack_int4(packed), codes)
    assert torch.equal(unpack_from_int32(packed, 4, codes.shape), codes)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 400), st.integers(0, 2**31))
def test_shuffle_goes_back_for_any_shape(rows, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, inputs), dtype=torch.int8, generator=generator)
    words = shuffle(codes)
    assert words.shape == (-(-inputs // CHUNK), rows, 32)
    assert torch.equal(unshuffle(words, inputs), codes)


def test_shuffle_puts_input_128c_32i_j_into_nibble_i_of_word_j():
    codes = torch.full((3, 256), -8, dtype=torch.int8)
    codes[1, 128 + 2 * 32 + 5] = 7
    words = shuffle(codes)
    assert words[1, 1, 5] == 15 << 8
    assert words.count_nonzero() == 1


@pytest.mark.parametrize(
    "bad", [torch.full((4, 8), 8, dtype=torch.int8), torch.zeros(4, 8), torch.zeros(8, dtype=torch.int8)]
)
def test_codes_that_are_none_are_refused(bad):
    with pytest.raises(GraceError, match="int4 codes must"):
        shuffle(bad)


@pytest.mark.parametrize(("out", "inputs", "group"), [(16, 32, 32), (48, 128, 64), (64, 384, 128), (176, 256, 256)])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_cpu_product_against_float64(out, inputs, group, rows):
    codes, scales, x, expected = problem(out, inputs, group, rows, 5, torch.bfloat16)
    assert cpu.serves(out, inputs, group, torch.bfloat16)
    poison = torch.full((rows, out), float("nan"), dtype=torch.bfloat16)
    del poison
    y = cpu.gemm(x, cpu.pack(codes), cpu.scales_and_zeros(scales), group)
    assert (y.double() - expected).norm() < 4e-3 * expected.norm()


def test_cpu_product_is_offered_only_where_it_runs():
    for out, inputs, group, dtype in [
        (8, 64, 32, torch.bfloat16),
        (16, 64, 16, torch.bfloat16),
        (16, 64, 32, torch.float32),
    ]:
        assert not cpu.serves(out, inputs, group, dtype)


SOME_GPU = GPU("a GPU", 132, 227 << 10)


def test_rule_follows_the_shape():
    few = choose(1, 4096, 4096, 128, "bfloat16", SOME_GPU)
    assert few.kind == "ways" and few.block_m == 8 and 4096 // few.block_n * few.split >= 128
    assert choose(1, 22016, 4096, 128, "bfloat16", SOME_GPU).split == 1
    assert choose(1, 64, 128, 128, "bfloat16", SOME_GPU).split == 1
    assert choose(64, 4096, 4096, 128, "bfloat16", SOME_GPU).split > 1
    assert choose(512, 4096, 4096, 128, "bfloat16", SOME_GPU).kind == "round"
    assert choose(512, 4096, 4096, 64, "bfloat16", SOME_GPU).kind == "tile"
    assert choose(4096, 4096, 4096, 128, "bfloat16", SOME_GPU) == DENSE


@given(
    rows=st.integers(1, 5000), out=st.integers(1, 40000), chunks=st.integers(1, 100), group=st.sampled_from([32, 128])
)
def test_rule_fits_the_card(rows, out, chunks, group):
    small = GPU("a small GPU", 80, 99 << 10)
    tile = rule(rows, out, chunks * 128, group, small)
    if tile != DENSE:
        assert tile.shared() <= small.shared and 1 <= tile.split <= max(1, chunks)
        assert tile.kind != "ways" or rows <= tile.block_m


HOPPER = GPU("a Hopper GPU", 132, 227 << 10, hopper=True)


@given(rows=st.integers(65, 5000), out=st.integers(1, 5000).map(lambda n: 8 * n), chunks=st.integers(1, 100))
def test_rule_takes_hopper_for_large_products_where_it_runs(rows, out, chunks):
    tile = rule(rows, out, 128 * chunks, 128, HOPPER)
    assert (tile.kind == "hopper") == (rows * out * chunks >= HOPPER_FROM)
    assert tile.kind != "hopper" or (tile.shared() <= HOPPER.shared and (tile.split == 1 or 4 * tile.split <= chunks))
    for case in ((rows, out, 128 * chunks, 64, HOPPER), (rows, out + 4, 128 * chunks, 128, HOPPER)):
        assert rule(*case).kind != "hopper"
    assert rule(rows, out, 128 * chunks, 128, SOME_GPU).kind != "hopper"


def test_rule_fills_a_hopper_card():
    few = rule(256, 4096, 4096, 128, HOPPER)
    assert 100 <= -(-256 // few.block_m) * -(-4096 // few.block_n) * few.split <= 132
    tail = rule(256, 22016, 4096, 128, HOPPER)
    assert tail.split > 1 and tail.unsplit(172, 132) == 132


@given(cut=st.integers(1, 131), split=st.integers(2, 8), chunks=st.integers(8, 100))
@example(cut=61, split=8, chunks=58)
def test_parts_of_tiles_take_about_as_long(cut, split, chunks):
    """No part is empty, and the programs without a first part are not busy for longer than those with one."""
    first, rounds = Tile("hopper", 128, 128, split).first_part(cut, chunks, 132)
    rest = chunks - first
    assert first >= 1 and rest >= split - 1
    assert rounds * (min(132, cut * split) - cut) >= cut * (split - 1)
    assert rounds * rest <= first * (split - 1) or rest == split - 1


def test_measured_hopper_entries_are_left_where_hopper_does_not_run(monkeypatch):
    table, tile = {"GPUs": {}}, Tile("hopper", 256, 128, stages=2)
    with_entry(table, HOPPER.name, "bfloat16", 128, (4096, 4096), 256, tile)
    with_entry(table, HOPPER.name, "bfloat16", 128, (4100, 4096), 256, tile)
    monkeypatch.setattr("grace.kernels.w4a16_table.read_table", lambda: table)
    assert choose.__wrapped__(256, 4096, 4096, 128, "bfloat16", HOPPER) == tile
    without = replace(HOPPER, hopper=False)
    assert choose.__wrapped__(256, 4096, 4096, 128, "bfloat16", without) == rule(256, 4096, 4096, 128, SOME_GPU)
    assert choose.__wrapped__(256, 4100, 4096, 128, "bfloat16", HOPPER).kind == "round"


def test_measured_entries_come_first(monkeypatch):
    table, tile = {"GPUs": {}}, Tile("tile", 16, 32, 2, 4, 5)
    with_entry(table, "a GPU", "bfloat16", 128, (4096, 4096), 3, tile)
    monkeypatch.setattr("grace.kernels.w4a16_table.read_table", lambda: table)
    assert rows_key(3) == rows_key(4) == 4
    for dtype in ("bfloat16", "float16"):
        assert choose.__wrapped__(4, 4096, 4096, 128, dtype, SOME_GPU) == tile
    for case in ((5, 4096, 4096, 128, "bfloat16"), (4, 4096, 4096, 64, "bfloat16")):
        assert choose.__wrapped__(*case, SOME_GPU) != tile


def test_shipped_entries_are_tiles():
    for dtypes in read_table()["GPUs"].values():
        for shapes in dtypes.values():
            for entries in shapes.values():
                assert all(
                    Tile(**entry).kind in ("ways", "tile", "round", "hopper", "dense") for entry in entries.values()
                )


def test_step_sizes_in_pairs():
    scales = torch.arange(2 * 130).view(130, 2).half()
    pairs = pair_steps(scales)
    assert pairs.shape == (2, 256) and not pairs[:, 144:].any()
    for group in range(2):
        for block, j in ((0, 0), (3, 5), (8, 1)):
            low, high = pairs[group, 16 * block + 2 * j], pairs[group, 16 * block + 2 * j + 1]
            assert low == (scales[16 * block + j, group] if 16 * block + j < 130 else 0)
            assert high == (scales[16 * block + j + 8, group] if 16 * block + j + 8 < 130 else 0)
