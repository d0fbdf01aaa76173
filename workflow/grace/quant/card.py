"""The packed folder's model card: what it is, how it was made, how well it does, and how to load it."""

from typing import Any

from grace import __version__
from grace.nested import flatten
from grace.quant.student import DESCRIPTION, TENSORS, StoredQuantization

METHODS = {
    "lsq": "quantisation-aware training with learned step sizes",
    "rtn": "round-to-nearest, without training",
    "awq": "AWQ, without training",
    "gptq": "GPTQ, without training",
}


def _rows(value: dict[str, Any]) -> dict[str, Any]:
    """Dotted names and values; empty and unset values are left out."""
    return {name: leaf for name, leaf in flatten(value) if leaf not in (None, [], {})}


def _table(head: tuple[str, str], rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in rows.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def model_card(
    stored: StoredQuantization, config: dict, manifest: dict, source: str | None, metrics: dict[str, Any]
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        stored: the student's codes.
        config: the packed config.json.
        manifest: the student's manifest: what its maker recorded (`run`, `identity`) and its files' hashes.
        source: SHA-256 of the student's files, `contents_hash`.
        metrics: {name: number}, nested at will.
    """
    kind = config["architectures"][0]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": "[grace, compressed-tensors]",
    }
    hashes = {
        name: entry["sha256"] for name, entry in manifest.get("files", {}).items() if name in (TENSORS, DESCRIPTION)
    }
    if source:
        hashes = {"the student's files": source, **hashes}
    recipe = _rows({key: value for key, value in manifest.items() if key != "files"})
    parts = [
        "\n".join(["---", *(f"{key}: {value}" for key, value in front.items()), "---"]),
        f"# {kind}, INT{stored.bits} ({stored.method})",
        f"{len(stored.layers)} linears of the language model hold signed {stored.bits}-bit codes in groups of "
        f"{stored.group_size} along the input, one bf16 step size each; head, projector and vision tower are bf16. "
        f"Made by {METHODS.get(stored.method, stored.method)} (grace-pipeline {__version__}, after GRACE, arXiv 2601.22709).",
        "Format: compressed-tensors `pack-quantized`. It needs no code of ours:",
        f'```python\nfrom transformers import AutoProcessor, {kind}\n\nmodel = {kind}.from_pretrained("FOLDER")\n'
        'processor = AutoProcessor.from_pretrained("FOLDER")\n```',
    ]
    if metrics:
        parts += ["## Metrics", _table(("metric", "value"), _rows(metrics))]
    if recipe:
        parts += ["## Recipe and data", _table(("parameter", "value"), recipe)]
    if hashes:
        parts += ["## SHA-256 of what it was packed from", _table(("file", "SHA-256"), hashes)]
    parts.append("The files' own SHA-256 stand in manifest.json.")
    return "\n\n".join(parts) + "\n"
