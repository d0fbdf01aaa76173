"""The teacher's cache: the teacher runs once per conversation and never inside training.

`writer` makes shards, `finalize` closes them with a manifest, `reader` serves them to training, `audit` says what the
cache costs in accuracy; `formats` and `sampled` are the arithmetic, `identity` is what must agree.
"""
