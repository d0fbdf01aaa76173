"""What `grace cache info` prints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace.teacher.identity import short


def size(count: float) -> str:
    """Bytes with a unit: 1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def summary(folder: Path, manifest: Mapping[str, Any]) -> str:
    """The manifest in words: what the cache is of, sizes per record and per token, and the audit."""
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    shards = sum(entry["bytes"] for entry in manifest["shards"])
    records, tokens = manifest["records"], manifest["supervised_tokens"]
    at = f" at T = {manifest['temperature']:g}" if manifest["format"] == "sampled" else ""
    lines = [
        f"{folder}",
        f"format      {manifest['format']}{at}, teacher in {manifest['dtype']}, V = {manifest['vocabulary']:,}, d_T = "
        f"{manifest['width']:,}",
        f"teacher     {short(manifest['teacher'])}   tokenizer {short(manifest['tokenizer'])}   "
        f"processor {short(manifest['processor'])}   template {short(manifest['template'])}",
        f"written by  {', '.join(f'{name} {number}' for name, number in manifest['libraries'].items())}",
        f"holds       {records:,} records, {tokens:,} supervised tokens, {manifest['grams']:,} Gram matrices, "
        f"{len(manifest['shards'])} shards",
        f"size        {size(total)}: {size(shards / max(records, 1))} per record, "
        f"{size(token_bytes(manifest))} per supervised token, the rest Gram matrices and the audit",
        f"mean gate   {manifest['gate_sum'] / max(tokens, 1):.4f}",
    ]
    found = manifest["audit_results"]
    lines.append(f"audit       {found['records']} records, {found['tokens']} tokens, T = {found['temperature']:g}")
    for name, value in found["gated_dkd"].items():
        relative = _number(value["relative_error"], "+.2%")
        lines.append(
            f"  gated DKD {_number(value['loss'])}, error {_number(value['error'], '+.2g')} ± "
            f"{_number(value['standard_error'], '.2g')} ({relative}), gradient cosine "
            f"{_number(value['gradient_cosine'], '.4f')}: {name}"
        )
    relational = found["relational_cka"]
    lines.append(
        f"  1 - CKA {_number(relational['loss'])}, error {_number(relational['error'], '+.2g')} ± "
        f"{_number(relational['standard_error'], '.2g')}: the teacher's visual tokens with noise"
    )
    return "\n".join(lines)


def token_bytes(manifest: Mapping[str, Any]) -> float:
    """Bytes stored per supervised token: its logits' stand-in and its gate."""
    width = manifest["width"]
    if manifest["format"] == "hidden":
        return 2 * width + 4
    if manifest["format"] == "hidden-int8":
        return width + 2 * -(-width // 32) + 4
    return 4 * (4 + manifest["head"] + manifest["tail"])
