"""Predictions that were made on the way by another model's job, summed up for their own job to take over.

Summing them up takes pandas and the statistics, which need longer to be imported than all else that is left to do.
"""

from pathlib import Path
from typing import Any

from grace.errors import GraceError
from grace.evaluate.asked import Asked
from grace.files import list_files, read_json, write_json, write_manifest

_KEPT = ".manifest.json"


def keep(out: Path, key: str, manifest: dict[str, Any]) -> None:
    """Leave the manifest of the predictions in `out`, which depend on `key` (`Asked.key_of_all`)."""
    write_json(out / _KEPT, {"key": key, "manifest": manifest})


def drop(out: Path) -> None:
    """Forget what was kept: the predictions are about to change, or to be summed up again."""
    (out / _KEPT).unlink(missing_ok=True)


def take_over(run: Path, model: Path, data: Path, out: Path) -> bool:
    """Write `out/manifest.json` where one was kept that says what asking would give, of files that are still there.

    Otherwise all is left as it is, and asking (`grace.evaluate.commands.evaluate`) says what is wrong.
    """
    if not (out / _KEPT).is_file():
        return False
    try:
        kept = read_json(out / _KEPT)
        key, manifest = kept["key"], kept["manifest"]
        if key != Asked(run, model, data).key_of_all():
            return False
    except (GraceError, KeyError, TypeError):
        return False
    drop(out)
    if list_files(out) != manifest["files"]:
        return False
    write_manifest(out, **manifest)
    return True
