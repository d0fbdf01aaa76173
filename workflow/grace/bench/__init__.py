"""Benchmarks of the int4 product and of decoding, under one set of rules for CPUs and GPUs."""
