"""`grace evaluate`: every benchmark of a run for one model, in one process."""

import importlib
import importlib.metadata
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from grace.config.runs import EvaluateRun
from grace.errors import GraceError
from grace.evaluate.predictions import (
    finished,
    model_hash,
    prediction_key,
    read_rows,
    summary,
    write_predictions,
)
from grace.evaluate.registry import LM_EVAL, LMMS_EVAL, VLMEVAL, Benchmark, benchmark, task_id
from grace.files import MANIFEST, read_json, sha256, write_json
from grace.progress import progress

_MODULES = {
    LM_EVAL: "grace.evaluate.harness_lm_eval",
    LMMS_EVAL: "grace.evaluate.harness_lmms_eval",
    VLMEVAL: "grace.evaluate.harness_vlmeval",
}
_PACKAGES = {LM_EVAL: "lm_eval", LMMS_EVAL: "lmms_eval"}
_INSTALL = {
    LM_EVAL: "pip install 'lm-eval>=0.4.13'",
    LMMS_EVAL: "pip install --no-deps -r envs/lmms-eval.txt",
    VLMEVAL: "pip install -r envs/vlmeval.txt",
}

FEATURES = "features.safetensors"  # what the frozen tower makes of the benchmarks' pictures, where it was kept
Predict = Callable[[Benchmark, Path], pd.DataFrame]


def evaluate(run: Path, model: Path, data: Path, out: Path) -> None:
    """Ask a model every question of every benchmark; write `out/{benchmark}.parquet` and, last, `out/manifest.json`.

    A benchmark whose predictions are there and were made by the same model, questions, settings and harness is not
    asked again; with none left, neither the model nor the harness is loaded. A benchmark that fails does not stop the
    others: their predictions are kept, and a `GraceError` at the end names what failed.

    Args:
        run: frozen parameters (`EvaluateRun`).
        model: model folder, plain or packed, with its processor.
        data: data folder with `benchmarks/{name}.parquet` (or `.tsv` in VLMEvalKit's format).
        out: predictions folder.
    """
    parameters = EvaluateRun.model_validate(read_json(run))
    settings = parameters.evaluation
    entries = [benchmark(name) for name in settings.benchmarks]
    for entry in entries:
        task_id(entry.name, settings.harness)
    harness = _harness(settings)
    made_by = model_hash(model)
    asked = settings.model_dump(exclude={"benchmarks", "vlmeval_checkout"})
    out.mkdir(parents=True, exist_ok=True)
    failed, keys, pending = [], {}, []
    for entry in entries:
        try:
            questions = _questions_file(data, entry.name)
            keys[entry.name] = prediction_key(made_by, sha256(questions), asked, harness, entry)
        except GraceError as error:
            failed.append(str(error))
            continue
        if finished(out / f"{entry.name}.parquet", keys[entry.name]) is None:
            pending.append((entry, questions))
    if pending or failed:
        (out / MANIFEST).unlink(missing_ok=True)
    if pending:
        failed += _run_all(pending, parameters, model, out, keys)
    if failed:
        raise GraceError(
            f"{len(failed)} of {len(entries)} benchmarks failed, the others are kept: " + "; ".join(failed)
        )
    _write_manifest(out, entries, keys, made_by, harness)


def _run_all(
    pending: list[tuple[Benchmark, Path]], parameters: EvaluateRun, model: Path, out: Path, keys: dict[str, str]
) -> list[str]:
    """Predict and write the benchmarks of `pending`; return what failed."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harnesses' own bars
    os.environ.setdefault("LMEVAL_HASHMM", "0")  # lm-eval's search for pictures to hash in rows, which hold none
    limit, failed = parameters.evaluation.limit, []
    total = sum(entry.size if limit is None else min(entry.size, limit) for entry, _ in pending)
    with progress(f"evaluating {model}", total) as advance:
        predict = _predictor(parameters, model, pending[0][1].parent / FEATURES, advance)
        said = 0
        for entry, questions in pending:
            start = time.monotonic()
            try:
                rows = predict(entry, questions)
                said += int(rows["prediction"].str.strip().ne("").sum())
                write_predictions(out / f"{entry.name}.parquet", rows, keys[entry.name], time.monotonic() - start)
            except GraceError as error:
                failed.append(str(error))
    if not said and not failed:
        raise GraceError(
            f"{model}: answered nothing to any question of any benchmark; check its training log, and that its chat "
            "template is the one it was trained with"
        )
    return failed


def _predictor(parameters: EvaluateRun, model: Path, features: Path, advance: Callable[[int], None]) -> Predict:
    """The harness around the model, both loaded."""
    import torch

    from grace.data import load_features
    from grace.evaluate.runner import Runner
    from grace.models import load_model, load_processor, vision_tower

    settings = parameters.evaluation
    harness = importlib.import_module(_MODULES[settings.harness])
    loaded = load_model(model, device="cuda" if torch.cuda.is_available() else "cpu")
    kept = load_features(features, vision_tower(loaded))
    runner = Runner(loaded, load_processor(model), settings.batch, settings.max_new_tokens, kept)
    return harness.predictor(runner, settings, advance)


def _harness(settings) -> dict[str, str]:
    """Name and version of the harness; a `GraceError` says how to install a missing one."""
    name = settings.harness
    if name == VLMEVAL:
        if settings.vlmeval_checkout is None:
            raise GraceError("evaluation.vlmeval_checkout: is not set; give the folder of a VLMEvalKit checkout")
        asked = ["git", "-C", settings.vlmeval_checkout, "rev-parse", "HEAD"]
        found = subprocess.run(asked, capture_output=True, text=True)
        if found.returncode or not (Path(settings.vlmeval_checkout) / "vlmeval").is_dir():
            raise GraceError(
                f"evaluation.vlmeval_checkout: {settings.vlmeval_checkout} is no checkout of VLMEvalKit; clone it there"
            )
        return {"name": name, "version": found.stdout.strip()}
    try:
        return {"name": name, "version": importlib.metadata.version(_PACKAGES[name])}
    except importlib.metadata.PackageNotFoundError:
        raise GraceError(f"evaluation.harness: {name} is not installed in this environment; {_INSTALL[name]}") from None


def _questions_file(data: Path, name: str) -> Path:
    for suffix in (".parquet", ".tsv"):
        if (path := data / "benchmarks" / f"{name}{suffix}").is_file():
            return path
    raise GraceError(
        f"{data / 'benchmarks' / name}.parquet: no such benchmark file; run `grace prepare` with it in evaluation.benchmarks"
    )


def _write_manifest(out: Path, entries: list[Benchmark], keys: dict[str, str], model: str, harness: dict) -> None:
    """Sum up the predictions; files of benchmarks that are no longer asked for go."""
    benchmarks = {}
    for entry in entries:
        path = out / f"{entry.name}.parquet"
        seconds = finished(path, keys[entry.name])["seconds"]
        benchmarks[entry.name] = {
            "file": path.name, "sha256": sha256(path), "seconds": seconds, **summary(entry, read_rows(path)),
        }  # fmt: skip
    for path in out.glob("*.parquet"):
        if path.stem not in benchmarks:
            path.unlink()
    manifest = {"model": model, "harness": harness, "benchmarks": benchmarks}
    if not (out / MANIFEST).is_file() or read_json(out / MANIFEST) != manifest:
        write_json(out / MANIFEST, manifest)
