"""Benchmarks of the INT4 GEMM and of decoding, under one set of rules for CPUs and GPUs."""
