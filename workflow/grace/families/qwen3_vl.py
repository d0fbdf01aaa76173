"""Qwen3-VL: the decoder's first layers take features of the tower's middle layers too (deepstack).

No system turn of its own; patches of 16 pixels, where Qwen2-VL has 14.
"""

from grace.families.qwen2_vl import Qwen, chatml

FAMILY = Qwen(
    name="qwen3_vl",
    processor="Qwen3VLProcessor",
    template=chatml(None),
    trained=("merger", "deepstack_merger_list"),
)
