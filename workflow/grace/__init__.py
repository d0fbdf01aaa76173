"""GRACE: gated relational alignment via confidence-based distillation, as a reproducible pipeline."""

__version__ = "0.2.0"
