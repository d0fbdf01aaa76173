"""Work of other jobs, done by a process that has started already.

Starting (torch, transformers, a harness) costs a small model's job more than its work does. A job that was quick with
its own therefore goes on with what other jobs wait for, and leaves the manifests to these, which then find their work
done and start nothing; were one to fail here, its own job says why.
"""

import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from grace.config.code import CodeIndex
from grace.errors import GraceError
from grace.files import MANIFEST, check_manifest, contents_hash, move_folder
from grace.precision import split_precision

QUICK = 60.0  # seconds: what takes longer is left to a job of its own
ALTOGETHER = 600.0  # seconds after which nothing further is begun: a cluster ends jobs that run long


def while_quick(waiting: Iterable[tuple[Path, Path]], since: float, act: Callable[[Path, Path], None]) -> None:
    """Call `act(model, out)` for each that waits while that is quick; what one raises is said and stops no other.

    Args:
        since: `time.monotonic()` when this process began with its own model.
    """
    last = since
    for model, out in waiting:
        now = time.monotonic()
        if now - last > QUICK or now - since > ALTOGETHER:
            return
        last = now
        try:
            print(f"{model} too, for {out}, which waits for its own job", flush=True)
            act(model, out)
        except GraceError as error:
            print(f"{error}; its own job will say so", flush=True)
        except Exception:
            traceback.print_exc()


def unpacked(results: Path) -> Iterator[tuple[Path, Path]]:
    """(model, its packed folder) of every student below `results` that waits to be packed.

    Looks again before each, for other jobs pack too.
    """
    for folder in sorted(results.glob("students/*/*/seed*")):
        model, packed = folder / "model", folder / "packed"
        bits, _ = split_precision(folder.parent.name)
        whole = (model / MANIFEST).is_file() and (model / "quantization.json").is_file()
        if bits and whole and not (packed / MANIFEST).is_file() and not packed_ahead(model, packed).exists():
            yield model, packed


def packed_ahead(model: Path, packed: Path) -> Path:
    """Where a model is packed for its own job: beside `packed`, under a name that says of what and by which code."""
    made_of = [contents_hash(model / MANIFEST), _packing_code()]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return packed.with_name(f".{packed.name}.{key[:16]}.ahead")


@cache
def _packing_code() -> dict[str, Any]:
    return CodeIndex().fingerprint("pack")


def take_over(model: Path, packed: Path) -> bool:
    """Make what was packed ahead of this very model `packed`, if it is whole; whatever else was, is removed."""
    if not (model / MANIFEST).is_file():
        return False
    ahead = packed_ahead(model, packed)
    taken = False
    for found in packed.parent.glob(f".{packed.name}.*.ahead"):
        if found == ahead:
            try:
                check_manifest(found)
                move_folder(found, packed)
                taken = True
                continue
            except GraceError:
                pass
        shutil.rmtree(found, ignore_errors=True)
    return taken
