"""Compiles the kernels of the decoding step for CUDA GPUs without one; run by test_infer_llama_step.py on its own."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grace.kernels import decode_attention, decode_step

FLOATS = {"part_sum", "part_max", "part_weight", "key_steps", "value_steps"}
WIDE = {"token", "position", "slot", "first"}
NUMBERS = {"EPS": "fp32", "SCALE": "fp32"}


def build(kernel, gpu: int, dtype: str, warps: int = 4, **constants):
    """The compiled kernel, every pointer aligned to 16 bytes as torch's allocator does."""
    kinds = {}
    for name in kernel.arg_names:
        pointer = "*fp32" if name in FLOATS else "*i64" if name in WIDE else "*i32" if name in ("locks",
            "part_index") else f"*{dtype}"  # fmt: skip
        kinds[name] = NUMBERS.get(name, "i32") if name.isupper() else pointer
        if constants.get("CODES") and name in ("keys", "values"):
            kinds[name] = "*i8"
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kinds) if kinds[n].startswith("*")}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": 3, "launch_pdl": constants["PDL"]}
    return triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)


def main() -> None:
    for gpu, pdl in ((80, False), (90, True)):
        for group, width, split, codes in (
            (1, 128, 8, False),
            (1, 128, 1, True),
            (7, 128, 1, False),
            (6, 64, 16, True),
        ):
            rows = decode_attention.query_rows(group, split)
            shape = decode_attention.shape(rows, split, codes)
            warps = shape.pop("num_warps")
            done = build(
                decode_attention.attend_kernel, gpu, "bf16", warps, KV=4, G=group, ROWS=rows, D=width, SPLIT=split,
                NORM=group == 6, CODES=codes, PDL=pdl, OPERANDS=tl.bfloat16, **shape,
            )  # fmt: skip
            ptx = done.asm["ptx"]
            assert ("mma" in ptx) == (rows > 1) and ("griddepcontrol.wait" in ptx) == pdl
            assert "cp.async" in ptx
        for first in (True, False):
            build(decode_step.add_norm_kernel, gpu, "bf16", BLOCK=4096, EMBED=first, HAS_DELTA=not first, PDL=pdl)
        build(decode_step.silu_mul_kernel, gpu, "bf16", BLOCK=512, PDL=pdl)
        build(decode_step.argmax_kernel, gpu, "bf16", EACH=1024, PARTS=32, PADDED=32, PDL=pdl)


if __name__ == "__main__":
    main()
