"""An edit that was undone runs nothing again.

A run freezes parameters and code before its first job. Where it was ended and the edit taken back, Snakemake would
freeze them once more by a job, and run again whatever reads a file that a job has written, even with the content that
it was made from. Here that content is put back instead, with Snakemake's record of it, before it looks.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from grace.files import read_json, whole_file
from grace.provenance.snakemake_records import record_path, recorded


def put_back(results: str | Path, wanted: Callable[[str], str | None]) -> list[str]:
    """Freeze again, in place, what outputs were made from and a later run froze otherwise; for a folder's only run.

    Args:
        results: the experiment's folder.
        wanted: by `name` what `config/{name}.json` is to hold for the present configuration and code, without its last
            line's end; None where nothing asks for it.

    Returns:
        The files that were put back.
    """
    config = Path(results, "config")
    made_from: dict[str, set[str]] = defaultdict(set)
    for _, record in recorded():
        for name, checksum in record["input_checksums"].items():
            if Path(name).is_relative_to(config):
                made_from[name].add(checksum)
    done = []
    for name, checksums in sorted(made_from.items()):
        path, record = Path(name), record_path(name)
        if not record.is_file() or _settled(path, record, checksums):
            continue
        text = wanted(path.relative_to(config).with_suffix("").as_posix())
        if text is None or _checksum(text) not in checksums:
            continue
        with whole_file(path) as part:
            part.write_text(f"{text}\n")
        about = {**read_json(record), "params": [repr(text)], "endtime": path.stat().st_mtime, "incomplete": False}
        record.write_text(json.dumps(about))
        done.append(name)
    return done


def _settled(path: Path, record: Path, checksums: set[str]) -> bool:
    """Whether every output was made from what is frozen now, and the record says the same."""
    if not path.is_file():
        return False
    text = path.read_text(errors="replace").removesuffix("\n")
    return checksums == {_checksum(text)} and read_json(record).get("params") == [repr(text)]


def _checksum(text: str) -> str:
    """As Snakemake writes it, of the file that holds `text`."""
    content = f"{text}\n".encode()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
