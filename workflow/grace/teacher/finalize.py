"""`grace cache finish`: from shards to a cache, once all of them are there."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from grace.config.job_parameters import CacheRun, read_run
from grace.errors import GraceError
from grace.files import file_entry, whole_file, write_manifest
from grace.quant.checkpoint import Checkpoint
from grace.teacher.audit import audit
from grace.teacher.identity import differences, run_pins
from grace.teacher.index import INDEX_FILE, write_index
from grace.teacher.manifest import read_sidecar
from grace.teacher.reader import AUDIT_FILE, HEAD_FILE, TeacherCache
from grace.teacher.sampled import entry_counts
from grace.teacher.shard import Shard, damage, shard_name, shard_range

_COPIED = ("file", "bytes", "sha256", "records", "grams", "audited", "tokens", "gate_sum")


def finish(run: Path, teacher: Path, data: Path, out: Path) -> None:
    """Check that every shard is there, keep the teacher's head, audit the cache and write its manifest.

    Shards are checked by size here and by checksum when they are read: a cache may be terabytes.

    Args:
        run: a frozen `CacheRun`.
        teacher, data, out: as for `write`.
    """
    parameters = read_run(run, CacheRun)
    pins = run_pins(parameters, teacher, data)
    shards = parameters.cache.shards
    sidecars = _sidecars(out, shards, pins)
    vocabulary, width = sidecars[0]["vocabulary"], sidecars[0]["width"]
    _remove_other_divisions(out, shards)
    _write_head(teacher, out, getattr(torch, parameters.compute_dtype), (vocabulary, width))
    parts = [{name: sidecar[name] for name in _COPIED} for sidecar in sidecars]
    _write_audit(out, parts)
    write_index(out, parts)
    head, tail = entry_counts(vocabulary) if parameters.cache.format == "sampled" else (None, None)
    manifest = {
        **pins,
        "vocabulary": vocabulary,
        "width": width,
        "head": head,
        "tail": tail,
        "libraries": {
            name: ", ".join(sorted({sidecar["libraries"][name] for sidecar in sidecars}))
            for name in sidecars[0]["libraries"]
        },
        "records": sum(part["records"] for part in parts),
        "grams": sum(part["grams"] for part in parts),
        "supervised_tokens": sum(part["tokens"] for part in parts),
        "gate_sum": sum(part["gate_sum"] for part in parts),
        "shards": parts,
        "files": _files(out, parts),
    }
    cache = TeacherCache(out, manifest)
    write_manifest(out, **manifest, audit_results=audit(cache, temperature=parameters.temperature))


def _sidecars(out: Path, shards: int, pins: dict[str, Any]) -> list[dict[str, Any]]:
    found, problems = [], []
    for number in range(shards):
        name = shard_name(number, shards)
        sidecar = read_sidecar(out, name)
        if sidecar is None:
            problems.append(f"{name} is not written")
            continue
        different = differences(sidecar["pins"], pins)
        problem = damage(out, sidecar, None)
        if different:
            problems.append(f"{name} was made with {' and '.join(different)}")
        elif problem:
            problems.append(problem)
        elif range(sidecar["first"], sidecar["last"]) != shard_range(sidecar["conversations"], number, shards):
            problems.append(f"{name} covers other conversations")
        found.append(sidecar)
    if problems:
        raise GraceError(f"{out}: {'; '.join(problems)}; run `grace cache write` for the shards named")
    return found


def _remove_other_divisions(out: Path, shards: int) -> None:
    """Shards of a run with another `cache.shards`, which nothing reads any more."""
    for path in out.glob("shard-*-of-*.*"):
        if not path.stem.endswith(f"-of-{shards:05d}"):
            path.unlink()


def _write_head(teacher: Path, out: Path, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The vocabulary projection, straight from the checkpoint, in the dtype that the teacher ran in."""
    checkpoint = Checkpoint.of_folder(teacher)
    for ending in ("lm_head.weight", "embed_tokens.weight"):  # the embeddings where the two are tied
        names = [name for name in checkpoint if name.endswith(ending)]
        if names:
            break
    else:
        raise GraceError(f"{teacher}: holds neither lm_head.weight nor embed_tokens.weight; fetch the model again")
    weight = checkpoint[names[0]][: shape[0]].to(dtype).contiguous()  # without the rows that only pad it
    if tuple(weight.shape) != shape:
        raise GraceError(
            f"{teacher}: {names[0]} is {tuple(weight.shape)} where the shards' teacher had {shape}; write the cache "
            "again"
        )
    with whole_file(out / HEAD_FILE) as part:
        save_file({"weight": weight}, part)


def _write_audit(out: Path, parts: list[dict[str, Any]]) -> None:
    """Gather the records that the shards keep in full precision."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for entry in parts:
        if not entry["audited"]:
            continue
        shard = Shard(out, entry)
        shard.verify()
        records = shard.tensors["audit.records"].long()
        offsets, images = shard.tensors["token_offsets"], shard.tensors["image_offsets"]
        shown = torch.cat([torch.arange(int(images[r]), int(images[r + 1])) for r in records.tolist()])
        values = {
            "keys": shard.tensors["keys"][records],
            "counts": (offsets[1:] - offsets[:-1])[records],
            "images": (images[1:] - images[:-1])[records],
            "sizes": shard.tensors["gram.sizes"][shard.tensors["gram_of_image"][shown].long()],
            **{name: shard.tensors[f"audit.{name}"] for name in ("labels", "hidden", "grams")},
        }
        for name, value in values.items():
            pieces.setdefault(name, []).append(value)
    empty = {name: torch.empty(0) for name in ("counts", "images", "sizes", "labels", "grams")}
    empty |= {"keys": torch.empty(0, 32, dtype=torch.uint8), "hidden": torch.empty(0, 0)}
    with whole_file(out / AUDIT_FILE) as part:
        save_file({name: torch.cat(value) for name, value in pieces.items()} or empty, part)


def _files(out: Path, parts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every file of the cache with size and checksum, the shards' as their sidecars have them."""
    files = {part["file"]: {"bytes": part["bytes"], "sha256": part["sha256"]} for part in parts}
    for name in [*(Path(part["file"]).with_suffix(".json").name for part in parts), HEAD_FILE, AUDIT_FILE, INDEX_FILE]:
        files[name] = file_entry(out / name)
    return files
