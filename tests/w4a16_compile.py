"""Compiles the W4A16 kernels for CUDA cards without one; run by test_kernels_w4a16.py in a process of its own."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grace.kernels.w4a16_table import read_table
from grace.kernels.w4a16_triton import dequantise_kernel, w4a16_kernel

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a program may have
POINTERS = {"words": "*i16", "scales": "*bf16", "partial": "*fp32", "locks": "*i32"}
ALIGNED = [["tt.divisibility", 16]]


def build(kernel, card: int, dtype: str, warps: int, stages: int, **constants):
    """The compiled kernel, every pointer aligned to 16 bytes as torch's allocator does."""
    names = kernel.arg_names
    kinds = {name: POINTERS.get(name, "i32" if name.isupper() else f"*{dtype}") for name in names}
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): ALIGNED for i, name in enumerate(names) if kinds[name].startswith("*") or name in ("N", "K")}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps, "num_stages": stages}
    )


def main() -> None:
    shipped = read_table()["default"]["tiles"]
    cases = [(90, "bf16", 128, shipped[0], 4, True), (80, "fp16", 64, shipped[0], 1, True)]
    cases += [(80, "bf16", 32, shipped[1], 2, True), (90, "fp16", 128, shipped[0], 1, False)]
    for card, dtype, group, tile, split, ptx in cases:
        kind = {"bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
        done = build(
            w4a16_kernel, card, dtype, tile["warps"], tile["stages"], GROUP=group, BLOCK_M=tile["block_m"],
            BLOCK_N=tile["block_n"], SPLIT=split, EVEN_K=split > 1, HAS_BIAS=split == 1, PTX=ptx, OPERANDS=kind,
        )  # fmt: skip
        assert done.metadata.shared <= SHARED[card], f"{tile} needs {done.metadata.shared} bytes of shared memory"
        assert ("0x000f000f" in done.asm["ptx"]) == ptx
        assert "mma" in done.asm["ptx"]
    build(dequantise_kernel, 90, "bf16", 4, 3, GROUP=128, BLOCK_N=64, PTX=True)


if __name__ == "__main__":
    main()
