"""What the kernels of a decoding step share: starting before their predecessor ends, and locks.

On compute capability 9.0 and later the launches are programmatic and dependent (PDL): a kernel starts while its
predecessor ends, reads what no kernel of the step writes, and waits at `gdc_wait` before it touches anything else.
Every kernel waits, so that the end of one implies the end of all before it. The first kernel of a step lets the next
one start only after its wait: so all others know, even before theirs, that the step before has ended.
"""

from functools import cache

import torch
import triton
import triton.language as tl

LOCKS = 1 << 12


@triton.jit
def wait(PDL: tl.constexpr, FIRST: tl.constexpr = False):
    """Let the next kernel start, and wait for the last one to end; the FIRST kernel of a step the other way round."""
    if PDL:
        if not FIRST:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if FIRST:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def waited(PDL: tl.constexpr):
    """0, once the last kernel has ended; loads from an address that it is added to follow the wait.

    For loops whose asynchronous copies may go ahead of the wait: Triton from 3.9 on lets none pass `gdc_wait`.
    """
    nothing = tl.program_id(0) * 0
    if PDL:
        nothing = tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.b32 $0, 0;", "=r,r", [nothing], dtype=tl.int32, is_pure=False, pack=1
        )
    return nothing


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where Triton interprets on a CPU, a number that makes both one and several parts occur."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 12


@cache
def launch_options(device: torch.device) -> dict:
    """PDL: programmatic dependent launch, from compute capability 9.0 on."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def locks(device: torch.device, least: int) -> torch.Tensor:
    """int32 zeros, which every kernel leaves as zeros; one kernel at a time uses them."""
    return torch.zeros(max(LOCKS, least), dtype=torch.int32, device=device)
