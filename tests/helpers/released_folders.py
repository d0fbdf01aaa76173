"""Checkpoints in the formats of the authors' release, made from a model folder as published."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from grace.files import MANIFEST, read_json, write_json
from grace.quant.import_release import MODULES, SIDECAR
from grace.quant.names import quantised_module

GROUP = 32
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # output column of the i-th nibble


def made(plain, out, bits: int, log_scale: torch.dtype, rounded: bool):
    """(weights, codes and log_scale by module) of a release; the weights are bf16(code * exp(log_scale)).

    `rounded`: codes of the model's own weights, so that it still answers; otherwise any codes.
    """
    shutil.copytree(plain, out)
    for name in ("quantization.json", "quantization.safetensors", MANIFEST):
        (out / name).unlink(missing_ok=True)
    weights, layers = load_file(out / "model.safetensors"), {}
    random = torch.Generator().manual_seed(bits)
    for key, weight in weights.items():
        if quantised_module(key):
            codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), weight.shape, generator=random)
            steps = torch.rand(weight.numel() // GROUP, generator=random) - 5
            if rounded:
                groups = weight.float().view(-1, GROUP)
                steps = (groups.abs().amax(1) / (2 ** (bits - 1) - 1)).log()
                codes = (groups / steps.to(log_scale).float().exp().unsqueeze(1)).round().view(weight.shape).long()
                codes = codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            layers[key.removesuffix(".weight")] = codes, steps.to(log_scale)
            scales = steps.to(log_scale).float().exp().view(len(codes), -1).repeat_interleave(GROUP, 1)
            weights[key] = (codes * scales).bfloat16()
    config = read_json(out / "config.json")
    write_json(out / "config.json", {**config, "qat": {"bits": bits, "group_size": GROUP, "num_replaced": len(layers)}})
    return weights, layers


def dense(plain, out, bits: int = 4, log_scale: torch.dtype = torch.bfloat16, rounded: bool = False):
    """As training writes it: dense weights, and the sidecar."""
    weights, layers = made(plain, out, bits, log_scale, rounded)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    sidecar = {f"{name}.weight": weights[f"{name}.weight"] for name in layers}
    torch.save(sidecar | {f"{name}.log_scale": steps for name, (_, steps) in layers.items()}, out / SIDECAR)
    return weights, layers


def awq(plain, out, rounded: bool = False):
    """As the packer writes it: nibbles in GEMM order, fp16 scales, a list of modules."""
    weights, layers = made(plain, out, 4, torch.float32, rounded)
    for name, (codes, steps) in layers.items():
        del weights[f"{name}.weight"]
        rows, columns = codes.shape
        words = torch.zeros(columns, rows // 8, dtype=torch.int64)
        for place, column in enumerate(NIBBLES):
            words |= (codes.T[:, column::8] + 8) << 4 * place
        weights[f"{name}.qweight"] = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        weights[f"{name}.qzeros"] = torch.full((columns // GROUP, rows // 8), -2004318072, dtype=torch.int32)
        weights[f"{name}.scales"] = steps.exp().view(rows, -1).T.contiguous().half()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / MODULES, {"bits": 4, "group_size": GROUP, "modules": list(layers)})
    return layers
