"""The INT4 GEMMs that run on a CUDA GPU: this project's, torch's tinygemm, and packages of an optional extra.

gemlite, humming-kernels and bitsandbytes are used where they are installed; each gets the same codes and scales
in its own layout. bitsandbytes multiplies another 4-bit format (NF4), so it is compared with its own weights.
"""

# The packages of an extra need not be here.
# pyright: reportMissingImports=false

import importlib.util
import json
import sys

import torch

from grace.bench.backend import Backend, dense, group_of
from grace.kernels import w4a16
from grace.kernels.w4a16_layout import ZERO, pack_int4


def cuda_backends() -> list[Backend]:
    """This project's GEMM first, then what is installed and can be imported."""
    found = [TRITON, TINYGEMM]
    for package, make in (("gemlite", _gemlite), ("humming", _humming), ("bitsandbytes", _bitsandbytes)):
        if importlib.util.find_spec(package) is None:
            continue
        try:
            found.append(make())
        except Exception as failure:  # another version's interface, or a library that it does not find
            print(f"left out: {package} is installed but does not load: {failure}", file=sys.stderr)
    return found


def _tinygemm_prepare(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> tuple:
    nibbles = (codes + ZERO).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack((nibbles[:, ::2] << 4 | nibbles[:, 1::2]).contiguous(), 8)
    by_group = scales.to(dtype).t()
    return packed, torch.stack((by_group, torch.zeros_like(by_group)), dim=-1).contiguous(), group_of(codes, scales)


TRITON = Backend(
    name="grace (Triton)",
    serves=lambda n, k, group, dtype: w4a16.serves(k, group, dtype),
    prepare=lambda codes, scales, dtype: (*w4a16.pack(codes, scales.to(dtype)), group_of(codes, scales)),
    gemm=lambda x, prepared: w4a16.w4a16(x, prepared[0], prepared[1], None, x.shape[1], prepared[2]),
)
TINYGEMM = Backend(
    name="tinygemm (torch)",
    serves=lambda n, k, group, dtype: dtype == torch.bfloat16 and group in (32, 64, 128, 256) and n % 8 == k % 128 == 0,
    prepare=_tinygemm_prepare,
    gemm=lambda x, prepared: torch.ops.aten._weight_int4pack_mm(x, prepared[0], prepared[2], prepared[1]),
    foreign=True,
)


def _gemlite() -> Backend:
    import gemlite
    from gemlite.core import forward_functional

    kinds = {torch.float16: gemlite.DType.FP16, torch.bfloat16: gemlite.DType.BF16}

    def prepare(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> tuple:
        n, k = codes.shape
        kind = kinds[dtype]
        layer = gemlite.GemLiteLinear(
            4, group_size=group_of(codes, scales), in_features=k, out_features=n, input_dtype=kind, output_dtype=kind
        )
        layer.pack((codes + ZERO).to(torch.uint8), scales.to(dtype), ZERO, None)
        tensors = [part.data if hasattr(part, "data") else part for part in layer.get_tensor_args()]
        return (*tensors, layer.get_meta_args())

    return Backend(
        name="gemlite",
        serves=lambda n, k, group, dtype: dtype in kinds and n % 32 == k % 32 == 0,
        prepare=prepare,
        gemm=lambda x, prepared: forward_functional(x, None, list(prepared[:-1]), prepared[-1]),
        foreign=True,
    )


def _humming() -> Backend:
    from humming import ops, transform
    from humming.schema import HummingWeightSchema
    from humming.tune import get_heuristics_config

    locks = torch.zeros(2048, dtype=torch.int32, device="cuda")

    def prepare(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> tuple:
        schema = HummingWeightSchema(b_dtype="uint4", weight_scale_group_size=group_of(codes, scales))
        n, k = codes.shape
        layer = transform.prepare_layer_config(shape_n=n, shape_k=k, weight_schema=schema, torch_dtype=dtype)
        given = {"weight": pack_int4(codes), "weight_scale": scales.to(dtype).contiguous()}
        ready = transform.transform_humming_tensors(layer, given)
        return ready["weight"], ready["weight_scale"], layer

    def gemm(x: torch.Tensor, prepared: tuple) -> torch.Tensor:
        weight, scale, layer = prepared
        tuning = json.dumps(get_heuristics_config(layer, shape_m=len(x)))
        return ops.humming_gemm(
            layer_config=layer.to_str(), inputs=x, weight=weight, weight_scale=scale, tuning_config=tuning, locks=locks
        )

    return Backend(
        name="humming",
        serves=lambda n, k, group, dtype: dtype in (torch.float16, torch.bfloat16) and n % 64 == k % 64 == 0,
        prepare=prepare,
        gemm=gemm,
        foreign=True,
    )


def _bitsandbytes() -> Backend:
    import bitsandbytes
    import bitsandbytes.functional as functional

    def prepare(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> tuple:
        return functional.quantize_4bit(
            dense(codes, scales, dtype), blocksize=group_of(codes, scales), quant_type="nf4"
        )

    return Backend(
        name="bitsandbytes NF4",
        serves=lambda n, k, group, dtype: group in (64, 128, 256),
        prepare=prepare,
        gemm=lambda x, prepared: bitsandbytes.matmul_4bit(x, prepared[0].t(), quant_state=prepared[1]),
        weight=lambda prepared: functional.dequantize_4bit(*prepared).double(),
        foreign=True,
    )
