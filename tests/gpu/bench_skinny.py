"""Check and time the products of a few rows with dense 16-bit weights on a CUDA GPU, beside cuBLAS.

    python tests/gpu/bench_skinny.py [--rows 1,2,4,8,16] [--dtype bfloat16]

First random cases against float64, with poisoned outputs, alike to the bit 20 times. Then the layers of LLaVA-1.5-7B
and Qwen2-VL-2B as a decoding step multiplies them: CUDA graphs over weights that together miss the L2, interleaved
medians, and the share of the time of reading the weights alone, at the bandwidth of a large sum in the same run.
Exits with 1 if a product is wrong.
"""

import argparse
from functools import partial
from itertools import product

import bench_w4a16
import torch
from read_bandwidth import read_bandwidth

from grace.bench.machine import describe, last_cache_bytes
from grace.bench.timing import copies_past_cache, interleaved_medians
from grace.kernels.skinny_gemm import choose, gemm

ALONE = ("llava gate|up", "qwen2 gate|up", "qwen2 k|v")  # a decoding step multiplies them joined
SHAPES = {name: shape for name, shape in bench_w4a16.SHAPES.items() if name not in ALONE} | {
    "llava head": (32064, 4096),
    "qwen2 head": (151936, 1536),
}
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}


def check(device: torch.device) -> int:
    """Products against float64 and against themselves; the number of cases."""
    generator = torch.Generator(device).manual_seed(0)
    cases = list(product((1, 2, 5, 16), ((384, 2048), (4097, 1552), (100, 4112)), TOLERANCE, (True, False)))
    for rows, (outs, inputs), dtype, with_bias in cases:
        shapes = (rows, inputs), (outs, inputs), (outs,)
        x, weight, bias = (torch.randn(*s, device=device, generator=generator).to(dtype) for s in shapes)
        bias = bias if with_bias else None
        tile = choose(rows, 2 * inputs, inputs)
        poison = [torch.full((rows, outs), float("nan"), dtype=dtype, device=device) for _ in range(3)]
        del poison
        y = gemm(x, weight, bias, tile)
        expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
        error = ((y.double() - expected).norm() / expected.norm()).item()
        case = f"{dtype}, {rows} rows, {outs} x {inputs}, bias {with_bias}, {tile}"
        if not error < TOLERANCE[dtype]:
            raise SystemExit(f"wrong: {case}: relative error {error:.1e}")
        if not all(torch.equal(y, gemm(x, weight, bias, tile)) for _ in range(20)):
            raise SystemExit(f"wrong: {case}: two runs differ")
    return len(cases)


def measure(rows: list[int], dtype: torch.dtype, device: torch.device) -> None:
    """Print a line per shape and row count: microseconds of reading alone, of cuBLAS, of the kernel, their ratios."""
    bandwidth = read_bandwidth(device)
    generator = torch.Generator(device).manual_seed(0)
    print(f"reading {bandwidth / 1e12:.3f} TB/s; microseconds (% of reading alone)", flush=True)
    print("shape | M | reading | cuBLAS | Triton | x cuBLAS")
    for name, (outs, inputs) in SHAPES.items():
        weight = torch.randn(outs, inputs, device=device, generator=generator, dtype=dtype) * 0.02
        copies = copies_past_cache(weight.nbytes, last_cache_bytes(device), 64)
        weights = [weight] + [weight.clone() for _ in range(copies - 1)]
        floor = weight.nbytes / bandwidth
        for m in rows:
            x = torch.randn(m, inputs, device=device, generator=generator, dtype=dtype)
            calls = {"cuBLAS": [partial(torch.nn.functional.linear, x, one) for one in weights]}
            if tile := choose(m, outs, inputs):
                calls["Triton"] = [partial(gemm, x, one, None, tile) for one in weights]
            seconds = interleaved_medians(calls, 15, device)
            shown = [
                f"{seconds[name] * 1e6:.2f} ({100 * floor / seconds[name]:.0f})" if name in seconds else "-"
                for name in ("cuBLAS", "Triton")
            ]
            ratio = f"{seconds['cuBLAS'] / seconds['Triton']:.2f}" if tile else "-"
            print(f"{name} {outs}x{inputs}", m, f"{floor * 1e6:.2f}", *shown, ratio, sep=" | ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,2,4,8,16", help="M, comma-separated")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    device = torch.device("cuda")
    print(f"{check(device)} products right, and alike to the bit each time", flush=True)
    measure([int(m) for m in chosen.rows.split(",")], getattr(torch, chosen.dtype), device)
    print(describe(device))


if __name__ == "__main__":
    main()
