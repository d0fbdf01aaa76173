"""Versions of an experiment: the records that travel with its results, and what changed between two of them."""
