"""Files that the pipeline's own jobs hand to each other, broken at random: used, or refused in one sentence.

    PYTHONPATH=tests/helpers python tests/fuzz/exchange.py --seconds 600 --first 1000

The teacher's cache with its sidecars and manifest, prepared data, frozen parameters, checkpoints, stored codes, and a
results folder with predictions, speed tables, records and tables: one file is damaged, as a bad disk, a full one, a
careless merge or an editor would, and every reader of that folder looks at it. What hashes alone would catch is let
through to the readers behind.
"""

import contextlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from cases import failure, flags, run
from fake_results import make_results
from mutate import damage
from small_experiment import build

from grace.cluster.start import mend_records
from grace.config.accepted import accepted, accepted_file
from grace.config.job_parameters import CacheRun, EvaluateRun, TrainRun, read_run
from grace.data import load_prepared
from grace.data.prepared import keys_of
from grace.diff.compare import compare_folders
from grace.files import check_manifest, sha256, write_json
from grace.provenance.snakemake_records import FORMAT, record_path, restore, save, write_rows
from grace.provenance.tree import provenance
from grace.provenance.verify import verify
from grace.quant.student import read_quantization
from grace.report.tables.cells import read_cells
from grace.report.tables.write import write_tables
from grace.results.read import BASELINE, TEACHER, read_results
from grace.teacher.commands import finish, info
from grace.teacher.commands import verify as verify_cache
from grace.teacher.reader import TeacherCache
from grace.train.checkpoint import Checkpoints, Part
from grace.train.finished_run import finished
from grace.world import World

ALONE = World()


def sound(home: Path) -> None:
    """What is damaged, whole."""
    build(home)
    (home / "growing").write_text('{"step": 1}\n')
    saver = Checkpoints(home / ".running", "this run", home / "growing", ALONE)
    for step in (1, 2):
        saver.save(step, {"a": Part(torch.ones(3))}, {"beta": 0.5})
    saver.wait()
    results = make_results(home / "results/fake", seeds=(0,), questions=20)
    write_tables(read_results(results), results / "tables")
    rows = {}
    for path in sorted(results.rglob("manifest.json")):
        output = path.relative_to(home).as_posix()
        inputs = [f"results/fake/config/{name}.json" for name in ("experiment", "code/evaluate")]
        given = {"input": inputs, "input_checksums": {}}
        record = {
            "rule": "evaluate",
            "log": [],
            "starttime": 1.0,
            "endtime": 2.0,
            "params": [],
            "shellcmd": "",
            "record_format_version": FORMAT,
            "incomplete": False,
            **given,
        }
        rows[output] = {"output": output, "bytes": path.stat().st_size, "sha256": sha256(path), "record": record}
        write_json(home / record_path(output), record)
    write_rows(results / "provenance.jsonl", rows)
    code = {"subcommand": "evaluate", "chosen": ["grace.evaluate.ask"], "code": {"grace.files": "0"}, "data": {}}
    change = {"subcommand": "evaluate", "frozen": code, "accepted": {**code, "code": {}}, "changed": ["grace.files"]}
    write_json(results / "config/code/evaluate.json", code)
    accepted_file(results).write_text(
        json.dumps({**change, "by": "me", "at": "today", "reason": "the same bits"}) + "\n"
    )


def _cache(home: Path) -> None:
    cache = TeacherCache.open(home / "cache")
    keys = [key for key in keys_of(load_prepared(home / "data"))][:3]
    cache.check_keys(keys)
    cache.batch(keys)
    assert cache.head.ndim == 2


def _checkpoint(home: Path) -> None:
    done, facts = Checkpoints(home / ".running", "this run", home / "growing", ALONE).load({"a": Part(torch.zeros(3))})
    assert (done == 0) == (facts is None)
    finished(home / ".s", "this run")


def _report(home: Path) -> None:
    results = read_results(home / "results/fake", partial=True)
    for row in (TEACHER, BASELINE):
        for name in results.benchmarks if row in results.seeds else ():
            if results.has(row, name):
                results.estimate(row, name)
    _ = results.kernel, results.decode
    for row in results.rows():
        results.manifest(row, 0)


GROUPS: dict[str, tuple[str, list[Callable[[Path], Any]]]] = {
    "cache": ("cache/*", [
        _cache, lambda h: info(h / "cache"), lambda h: verify_cache(h / "cache"),
        lambda h: finish(h / "cache.json", h / "teacher", h / "data", h / "cache"),
    ]),
    "data": ("data/*.*", [lambda h: load_prepared(h / "data")[0], lambda h: check_manifest(h / "data")]),
    "frozen": ("*.json", [
        lambda h: [read_run(h / f"{name}.json", TrainRun) for name in ("student", "teacher")],
        lambda h: read_run(h / "cache.json", CacheRun), lambda h: read_run(h / "evaluation.json", EvaluateRun),
    ]),
    "checkpoint": (".running/*/*", [_checkpoint]),
    "finished": (".s/finished/*.json*", [_checkpoint]),
    "codes": ("student/quantization*", [lambda h: read_quantization(h / "student")]),
    "results": ("results/fake/**/*.*", [
        _report, lambda h: read_cells(h / "results/fake/tables"), lambda h: verify(h / "results/fake"),
        lambda h: provenance(h / "results/fake/students/grace/int4/seed0/predictions"),
        lambda h: restore("results/fake"),
        lambda h: compare_folders(h / "results/fake", h / "results/fake"), lambda h: accepted(h / "results/fake"),
    ]),
    "records": (".snakemake/metadata/*", [
        lambda h: mend_records(), lambda h: restore("results/fake"), lambda h: save("results/fake"),
    ]),
}  # fmt: skip


def failures(number: int, whole: Path, home: Path) -> dict[str, str]:
    """One case: every kind of failure, with the file."""
    draw, found = random.Random(number), {}
    group = draw.choice(["cache", "results", *GROUPS])
    pattern, readers = GROUPS[group]
    here = home / "case"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(whole, here)
    path = draw.choice(sorted(p for p in here.glob(pattern) if p.is_file() and p.suffix != ".png"))
    damage(draw, path)
    with contextlib.chdir(here):
        for read in readers:
            if failed := failure(partial(read, here)):
                found[f"{group}: {failed}"] = str(path.relative_to(here))
    return found


def main() -> int:
    arguments = flags(__doc__).parse_args()
    with TemporaryDirectory() as temporary:
        home = Path(temporary)
        with contextlib.redirect_stderr(io.StringIO()):
            sound(home / "whole")
        return run(arguments, lambda number: failures(number, home / "whole", home))


if __name__ == "__main__":
    sys.exit(main())
