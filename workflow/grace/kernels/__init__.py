"""Kernels for the hot paths; each knows tensors only. Triton is imported when one is used, not before."""
