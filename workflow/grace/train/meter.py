"""What a step costs: tokens per second, share of the GPU's peak, memory."""

import resource

import torch

# Dense bf16 peak in FLOP/s from the makers' data sheets, by a word of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}

TIMED = ("seconds", "tokens_per_second", "memory_gib", "mfu")
"""Of a step's entry in the log: what another run on another machine does not make again."""


class Meter:
    """Turns tokens and seconds into the numbers that the progress line and the log show.

    Model FLOPs are counted as 6 per trained weight of a matrix and token (forward and backward, no recomputation).
    """

    def __init__(self, matrix_weights: int, device: torch.device, processes: int) -> None:
        self.flops_per_token, self.device = 6 * matrix_weights, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = processes * next((peak for gpu, peak in PEAKS.items() if gpu in name), 0.0)

    def memory_gib(self) -> float:
        """Peak so far: of the GPU's allocator, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def measure(self, tokens: int, seconds: float) -> dict[str, float]:
        """`tokens_per_second`, `memory_gib` and, on a known GPU, `mfu` (0 to 1)."""
        found = {"tokens_per_second": round(tokens / seconds, 1), "memory_gib": round(self.memory_gib(), 3)}
        if self.peak:
            found["mfu"] = round(self.flops_per_token * tokens / seconds / self.peak, 4)
        return found
