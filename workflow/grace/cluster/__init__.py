"""Shared machines: what a run will ask of them, whether a Slurm would take it, and one writer per output."""
