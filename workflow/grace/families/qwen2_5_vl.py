"""Qwen2.5-VL: Qwen2-VL with windowed attention in the tower; template, geometry and names are the same."""

from grace.families.qwen2_vl import SYSTEM, Qwen, chatml

FAMILY = Qwen(name="qwen2_5_vl", processor="Qwen2_5_VLProcessor", template=chatml(SYSTEM), trained=("merger",))
