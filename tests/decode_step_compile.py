"""Compiles the kernels of the decoding step for CUDA cards without one; run by test_infer_llama_step.py on its own."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grace.kernels import decode_step

FLOATS = {"part_sum", "part_max", "part_weight"}
WIDE = {"token", "position", "slot"}
NUMBERS = {"EPS": "fp32", "SCALE": "fp32"}


def build(kernel, card: int, dtype: str, **constants):
    """The compiled kernel, every pointer aligned to 16 bytes as torch's allocator does."""
    kinds = {}
    for name in kernel.arg_names:
        pointer = "*fp32" if name in FLOATS else "*i64" if name in WIDE else "*i32" if name in ("locks", "part_index") else f"*{dtype}"  # fmt: skip
        kinds[name] = "*i1" if name == "valid" else NUMBERS.get(name, "i32") if name.isupper() else pointer
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kinds) if kinds[n].startswith("*")}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "num_stages": 3, "launch_pdl": constants["PDL"]}
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def main() -> None:
    for card, pdl in ((80, False), (90, True)):
        for group, width, split in ((1, 128, 8), (7, 128, 1), (6, 64, 16)):
            done = build(
                decode_step.attend_kernel, card, "bf16", KV=4, G=group, ROWS=16, D=width, BLOCK=32 if split > 1 else 64,
                SPLIT=split, NORM=group == 6, PDL=pdl, OPERANDS=tl.bfloat16,
            )  # fmt: skip
            assert "mma" in done.asm["ptx"] and ("griddepcontrol.wait" in done.asm["ptx"]) == pdl
        build(decode_step.add_norm_kernel, card, "bf16", BLOCK=4096, EMBED=True, HAS_DELTA=False, PDL=pdl)
        build(decode_step.add_norm_kernel, card, "bf16", BLOCK=4096, EMBED=False, HAS_DELTA=True, PDL=pdl)
        build(decode_step.silu_mul_kernel, card, "bf16", BLOCK=512, PDL=pdl)
        build(decode_step.argmax_kernel, card, "bf16", EACH=1024, PARTS=32, PADDED=32, PDL=pdl)


if __name__ == "__main__":
    main()
