"""Compiles the W4A16 kernels for CUDA GPUs without one; run by test_w4a16.py in a process of its own."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from grace.kernels.w4a16_hopper import DENSE_LAYOUT, WORDS_LAYOUT, hopper_kernel
from grace.kernels.w4a16_table import HOPPER_TILES, Tile
from grace.kernels.w4a16_triton import dequantise_kernel, tile_kernel, ways_kernel

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a program may have
POINTERS = {"words": "*i16", "pairs": "*i32", "partial": "*fp32", "locks": "*i32"}
ALIGNED = [["tt.divisibility", 16]]
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}


def build(kernel, gpu: int, dtype: str, warps: int, stages: int, **constants):
    """The compiled kernel, every pointer and size aligned to 16 as torch's allocator and the field's layers do."""
    names = kernel.arg_names
    kinds = {name: POINTERS.get(name, "i32" if name.isupper() else f"*{dtype}") for name in names}
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): ALIGNED for i, n in enumerate(names) if kinds[n].startswith("*") or n in ("N", "K", "PADDED")}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": warps, "num_stages": stages})


def product(gpu: int, dtype: str, group: int, tile: Tile, **changes):
    """The kernel of `tile` as `grace.kernels.w4a16.launch` would compile it for a whole number of tiles."""
    common = {
        "GROUP": group, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SPLIT": tile.split, "STAGES": tile.stages,
        "HAS_BIAS": False, "PTX": True, "PDL": gpu >= 90, "LATE": tile.late, "STEP_TYPE": TYPES[dtype],
        "OPERANDS": TYPES[dtype],
    }  # fmt: skip
    if tile.kind == "ways":
        kernel, more = ways_kernel, {"WAYS": tile.warps, "EVEN": True}
    else:
        kernel, more = tile_kernel, {"ROUND": tile.kind == "round", "EVEN_M": True, "EVEN_N": True}
    return build(kernel, gpu, dtype, tile.warps, tile.stages, **(common | more | changes))


def hopper(dtype: str, tile: Tile, **changes):
    """The kernel of `tile`, of kind "hopper", as `grace.kernels.w4a16_hopper.gemm` would compile it."""
    blocks = {
        "x": (dtype, [tile.block_m, 64], DENSE_LAYOUT),
        "words": ("i16", [64, 32], WORDS_LAYOUT),
        "y": (dtype, [tile.block_m, 64], DENSE_LAYOUT),
    }
    constants = {
        "GROUP": 128, "BLOCK_M": tile.block_m, "STAGES": tile.stages, "PARTS": tile.split > 1, "HAS_BIAS": False,
        "PDL": True,
    } | changes  # fmt: skip
    names = hopper_kernel.arg_names
    kinds = {name: POINTERS.get(name, "i32" if name.isupper() else f"*{dtype}") for name in names}
    kinds |= {name: f"tensordesc<{kind}{shape},{layout!r}>" for name, (kind, shape, layout) in blocks.items()}
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): ALIGNED for i, n in enumerate(names) if kinds[n].startswith("*") or n == "PADDED"}
    source = GluonASTSource(hopper_kernel, kinds, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def assembled(ptx: str) -> str:
    """What ptxas says of a kernel for Hopper: registers, spills, warnings."""
    with TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        return subprocess.run(
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source, "-o", source.with_suffix(".cubin")],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip


def spilled(said: str) -> int:
    """Bytes that ptxas says go to memory for want of registers."""
    return sum(int(bytes_) for bytes_ in re.findall(r"(\d+) bytes spill", said))


def check_hopper(dtype: str, tile: Tile, **changes) -> None:
    """Products wait for each other only where the kernel says so, nothing spills to memory, and the tile fits."""
    done = hopper(dtype, tile, **changes)
    assert 0 <= tile.shared() - done.metadata.shared < 1024 and tile.shared() <= SHARED[90], tile
    ptx = done.asm["ptx"]
    assert all(part in ptx for part in ("setmaxnreg", "0x000f000f", "griddepcontrol", "stmatrix"))
    said = assembled(ptx)
    assert "serialized" not in said, said
    assert spilled(said) <= 96, said  # a few of a split tile's end, outside of every loop over inputs


def conversions_in_loops(ttgir: str) -> int:
    """Conversions of layouts in the bodies of loops, of data: those of a few addresses cost little."""
    bodies = re.findall(r"scf\.for.*?scf\.yield", ttgir, re.S)
    return sum("tt.ptr" not in line for body in bodies for line in body.splitlines() if "ttg.convert_layout" in line)


def main() -> None:
    for tile in (
        Tile("ways", 8, 32, stages=6),
        Tile("tile", 8, 64),
        Tile("tile", 16, 64, split=4, stages=6),
        Tile("tile", 64, 64, stages=3),
        Tile("round", 128, 128, split=2, stages=3, resident=2),
    ):
        done = product(90, "bf16", 128, tile)
        assert done.metadata.shared <= SHARED[90], f"{tile} needs {done.metadata.shared} bytes of shared memory"
        assert 0.95 < tile.shared() / done.metadata.shared < 1.3, (tile, done.metadata.shared)
        assert "0x000f000f" in done.asm["ptx"] and "mma" in done.asm["ptx"] and "griddepcontrol" in done.asm["ptx"]
        assert conversions_in_loops(done.asm["ttgir"]) == 0, tile
    product(90, "fp16", 32, Tile("ways", 16, 32, split=2), HAS_BIAS=True, EVEN=False)
    product(90, "bf16", 64, Tile("tile", 16, 64), EVEN_M=False, EVEN_N=False)
    product(80, "fp16", 128, Tile("round", 64, 128, stages=3), HAS_BIAS=True)
    assert "0x000f000f" not in product(80, "bf16", 32, Tile("tile", 16, 64), PTX=False).asm["ptx"]
    for block_m, (stages, _) in HOPPER_TILES.items():
        for split in (1, 2):
            check_hopper("bf16", Tile("hopper", block_m, 128, split, stages=stages), HAS_BIAS=split == 2)
    check_hopper("fp16", Tile("hopper", 128, 128, 2, stages=4), GROUP=256, HAS_BIAS=True)
    build(dequantise_kernel, 90, "bf16", 4, 3, GROUP=128, BLOCK_N=64, PTX=True, STEP_TYPE=tl.float16)


if __name__ == "__main__":
    main()
