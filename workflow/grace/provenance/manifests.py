"""What a manifest lists: the files of a folder under `files`, or the predictions of a model under `benchmarks`."""

from typing import Any


def listed(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Files by name, each with `sha256` and, where the manifest keeps it, `bytes`.

    The data's manifest has `benchmarks` too, as a list of names: what it was asked to make.
    """
    files = dict(manifest.get("files") or {})
    for predictions in (manifest.get("benchmarks"), manifest.get("language")):
        for entry in predictions.values() if isinstance(predictions, dict) else ():
            files.setdefault(entry["file"], {"sha256": entry["sha256"]})
    return files
