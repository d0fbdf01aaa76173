"""Compiles the products of a few rows for Hopper without a GPU; run by test_kernels_skinny.py on its own."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grace.kernels.skinny_gemm import ROWS, choose, row_kernel, rows_kernel


def build(rows: int, inputs: int, dtype: str) -> str:
    """The PTX of the shipped tile, every pointer and size aligned to 16 as torch's allocator and the field's layers."""
    tile = choose(rows, inputs, inputs)
    kernel = row_kernel if rows == 1 else rows_kernel
    constants = {
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.stages, "PDL": True,
        "EVEN": inputs % tile.block_k == 0, "HAS_BIAS": True,
    }  # fmt: skip
    if rows > 1:
        constants |= {"BLOCK_M": ROWS, "OPERANDS": tl.bfloat16 if dtype == "bf16" else tl.float16}
    names = kernel.arg_names
    kinds = {name: "i32" if name.isupper() else f"*{dtype}" for name in names} | dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if kinds[n].startswith("*") or n in ("N", "K")
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.warps, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def main() -> None:
    for dtype in ("bf16", "fp16"):
        for inputs in (4096, 4096 + 16):
            row, rows = build(1, inputs, dtype), build(8, inputs, dtype)
            assert row.index("cp.async") < row.index("griddepcontrol.wait")  # the first weights come before the wait
            assert "wgmma" in rows and "griddepcontrol.wait" in rows
            for ptx in (row, rows):
                assert "griddepcontrol.launch_dependents" in ptx and "cp.async.ca" not in ptx  # copies of 16 bytes


if __name__ == "__main__":
    main()
