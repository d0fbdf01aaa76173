"""A linear layer whose weights stay packed, on whichever device it is."""

import torch
from torch import nn

from grace.errors import GraceError
from grace.kernels import cpu
from grace.kernels.w4a16_layout import check_codes, dequantise, pack_int4, unpack_int4


class Int4Linear(nn.Module):
    """y = x W^T + b, with W kept as 4-bit codes and one scale per group of consecutive inputs.

    The backend follows the device and the shape: on CUDA the Triton GEMM; on a CPU torch's int4 kernel where it
    takes the shape (bf16, outputs a multiple of 16, groups of 32, 64, 128 or 256); elsewhere the weight is
    dequantised at every call, which is exact and slow. Move a layer by making it on the device where it will run.

    Args:
        codes: int8 [out, in] in [-8, 7].
        scales: scales [out, in/group].
        bias: [out], or None.
        dtype: of activations and outputs, bf16, fp16 or fp32.
        device: where the layer runs.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        check_codes(codes)
        device = torch.device(device)
        self.out_features, self.in_features = codes.shape
        if scales.dim() != 2 or len(scales) != self.out_features or self.in_features % max(scales.shape[1], 1):
            raise GraceError(
                f"int4 scales {list(scales.shape)} do not fit codes {list(codes.shape)}; pack the model again"
            )
        self.group_size = self.in_features // scales.shape[1]
        self.backend = choose_backend(self.out_features, self.in_features, self.group_size, dtype, device)
        codes, scales = codes.to(device), scales.to(device)
        if self.backend == "triton":
            from grace.kernels import w4a16  # here, because it imports triton

            weight, scales = w4a16.pack(codes, scales)
            self._gemm = w4a16.w4a16
        elif self.backend == "torch-int4":
            weight, scales = cpu.pack(codes), cpu.scales_and_zeros(scales)
        else:
            weight = pack_int4(codes) if self.in_features % 8 == 0 else codes
        self.weight: torch.Tensor
        self.scales: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.to(device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        if self.backend == "triton":
            return self._gemm(x, self.weight, self.scales, self.bias, self.in_features, self.group_size)
        if self.backend == "torch-int4":
            y = cpu.gemm(x.reshape(-1, self.in_features).contiguous(), self.weight, self.scales, self.group_size)
            y = y if self.bias is None else y + self.bias
            return y.view(*x.shape[:-1], self.out_features)
        codes = self.weight if self.weight.dtype == torch.int8 else unpack_int4(self.weight)
        return nn.functional.linear(x, dequantise(codes, self.scales, x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group_size}, backend={self.backend}"


def choose_backend(
    out_features: int, in_features: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> str:
    """`triton`, `torch-int4` or `dequantise`: the fastest that takes this layer on this device."""
    if device.type == "cuda":
        from grace.kernels.w4a16 import serves

        return "triton" if serves(in_features, group_size, dtype) else "dequantise"
    if device.type == "cpu" and cpu.serves(out_features, in_features, group_size, dtype):
        return "torch-int4"
    return "dequantise"
