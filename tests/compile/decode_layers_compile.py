"""Compiles the kernel of all layers for Hopper without a GPU; run by test_infer_persistent_step.py on its own."""

import re

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from w4a16_compile import assembled, spilled

from grace.infer.persistent_step import STAGES, batch_stages, constants, stages
from grace.kernels.decode_layers import layers_kernel
from grace.kernels.decode_layers_batch import batch_kernel

SHARED, PROGRAMS = 227 * 1024, 132  # of an H100
POINTERS = {"counter": "*i32", "part_sum": "*fp32", "part_top": "*fp32", "squares": "*fp32"}
POINTERS |= dict.fromkeys(("table", "token", "position", "slot", "first"), "*i64")
NUMBERS = {"LAYERS": "i32", "LENGTH": "i32", "SCALE": "fp32", "EPS": "fp32"}


def build(hidden: int, inner: int, heads: int, group: int, width: int, dtype: str, batch: int = 1, **has: bool):
    """The kernel as `PersistentLayers` launches it, every pointer aligned to 16 bytes as torch's allocator does."""
    kernel = layers_kernel if batch == 1 else batch_kernel
    fixed = constants(hidden, inner, heads, group, width, SHARED, PROGRAMS, batch, **has)
    kinds = {name: NUMBERS.get(name) or POINTERS.get(name, f"*{dtype}") for name in kernel.arg_names}
    if batch > 1 and fixed["SPLIT"] == 1:
        kinds["part_sum"] = f"*{dtype}"
    kinds |= dict.fromkeys(fixed, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kinds) if kinds[n].startswith("*")}
    source = GluonASTSource(kernel, kinds, fixed, aligned)
    return fixed, triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def main() -> None:
    for shape, dtype, has in (
        ((4096, 11008, 32, 1, 128), "bf16", {}),  # LLaVA-1.5-7B
        ((5120, 13824, 40, 1, 128), "bf16", {}),  # LLaVA-1.5-13B
        ((512, 1024, 8, 1, 64), "fp16", {}),
        ((1536, 8960, 2, 6, 128), "bf16", {"biased": True}),  # Qwen2-VL-2B
        ((4096, 12288, 8, 4, 128), "bf16", {"normed": True}),  # Qwen3-VL-8B
        ((4096, 11008, 32, 1, 128), "bf16", {"codes": True}),
        ((4096, 11008, 32, 1, 128), "bf16", {"codes": True, "batch": 8}),
        ((1536, 8960, 2, 6, 128), "bf16", {"biased": True, "batch": 3}),
    ):
        fixed, done = build(*shape, dtype, **has)
        batch, units = has.get("batch", 1), fixed.get("UNITS", 0)
        assert fixed["STAGES"] == STAGES - (batch > 1)
        assert done.metadata.shared <= SHARED, f"{shape} needs {done.metadata.shared} bytes of shared memory"
        room = stages(fixed["PADS"], done.metadata.shared) if batch == 1 else batch_stages(units, done.metadata.shared)
        assert room >= fixed["STAGES"] - 1, "SHARED_REST is far too large"
        ptx = done.asm["ptx"]
        for part in ("0x00f000f0", "mma.sync", "cp.async.cg", "cp.async.mbarrier.arrive.noinc", "ld.acquire.gpu"):
            assert part in ptx, part
        # Copies past the last chunk or slot write zeros: they say how much they read.
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 0x10, %r", ptx)
        said = assembled(ptx)
        assert spilled(said) <= 64, said


if __name__ == "__main__":
    main()
