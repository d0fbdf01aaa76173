"""The bandwidth that reading weights can reach, for the scripts beside this one."""

import torch

from grace.bench.timing import interleaved_medians


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of a plain reduction over 4 GiB."""
    source = torch.ones(2**30, dtype=torch.float32, device=device)
    return source.nbytes / interleaved_medians({"read": [source.sum]}, 5, device)["read"]
