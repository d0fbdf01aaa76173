"""Gluon's names as Triton 3.9 has them, or 3.6; and the step around a ring of stages that both Gluon kernels take."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
write = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and the parity of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase
