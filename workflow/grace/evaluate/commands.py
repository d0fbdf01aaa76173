"""`grace evaluate`: every benchmark of a run for one model, in one process."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from grace.benchmarks.registry import ADAPTERS, LM_EVAL, LMMS_EVAL, VLMEVAL, Benchmark, benchmark, task_id
from grace.config.runs import EvaluateRun
from grace.environment import environment
from grace.errors import GraceError
from grace.evaluate.answer_log import Parts
from grace.evaluate.distribute import Share
from grace.evaluate.language import score_text, text_file, text_key, text_summary, write_text_scores
from grace.files import MANIFEST, read_json, sha256, write_json
from grace.progress import progress
from grace.results.predictions import (
    finished,
    model_hash,
    prediction_key,
    read_rows,
    summary,
    write_predictions,
)

if TYPE_CHECKING:
    from grace.evaluate.runner import Runner

_PACKAGES = {LM_EVAL: "lm_eval", LMMS_EVAL: "lmms_eval"}
_INSTALL = {
    LM_EVAL: "pip install 'lm-eval>=0.4.13'",
    LMMS_EVAL: "pip install --no-deps -r envs/lmms-eval.txt",
    VLMEVAL: "pip install -r envs/vlmeval.txt",
}

PARTS = ".parts"  # answers of a benchmark that is being asked
FEATURES = "features.safetensors"  # what the frozen tower makes of the benchmarks' images, where it was kept
Predict = Callable[[Benchmark, Path], pd.DataFrame]


def evaluate(run: Path, model: Path, data: Path, out: Path) -> None:
    """Ask a model every question of every benchmark; write `out/{benchmark}.parquet` and, last, `out/manifest.json`.

    A benchmark whose predictions are there and were made by the same model, questions, settings and harness is not
    asked again; with none left, neither the model nor the harness is loaded. Answers to a benchmark are kept as they
    come, so that a killed job goes on in the middle of one. A benchmark that fails does not stop the others: their
    predictions are kept, and a `GraceError` at the end names what failed.

    Started by torchrun, all processes call it: they share the questions, and the first one writes.

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
    made_by, share = model_hash(model), Share()
    asked = settings.model_dump(exclude={"benchmarks", "language", "vlmeval_checkout"})
    out.mkdir(parents=True, exist_ok=True)
    failed, keys, files = [], {}, {}
    for entry in entries:
        try:
            files[entry.name] = _questions_file(data, entry.name)
            keys[entry.name] = prediction_key(made_by, sha256(files[entry.name]), asked, harness, entry)
        except GraceError as error:
            failed.append(str(error))
    texts = {}
    for task in settings.language:
        try:
            texts[task] = text_key(made_by, task, settings.limit)
        except GraceError as error:
            failed.append(str(error))
    pending = [e for e in entries if e.name in keys and not finished(out / f"{e.name}.parquet", keys[e.name])]
    untold = [task for task, key in texts.items() if not finished(text_file(out, task), key)]
    pending, untold = share.agreed((pending, untold))
    if share.first and (pending or untold or failed):
        (out / MANIFEST).unlink(missing_ok=True)
    if pending or untold:
        with _asking(parameters, model, data, pending) as (runner, predict):
            for entry in pending:
                runner.parts = Parts(out / PARTS / keys[entry.name], share.rank)
                try:
                    start = time.monotonic()
                    rows = predict(entry, files[entry.name])
                    if share.first:
                        path = out / f"{entry.name}.parquet"
                        write_predictions(path, rows, keys[entry.name])
                        print(f"{entry.name}: {len(rows)} questions in {time.monotonic() - start:.1f} s", flush=True)
                        runner.parts.drop()
                except GraceError as error:
                    failed.append(str(error))
            for task in untold:
                try:
                    found = score_text(runner, task, settings.limit)
                    if share.first:
                        write_text_scores(text_file(out, task), found, texts[task])
                except GraceError as error:
                    failed.append(str(error))
    if failed:
        every = len(entries) + len(settings.language)
        raise GraceError(f"{len(failed)} of {every} benchmarks failed, the others are kept: " + "; ".join(failed))
    if share.first:
        _write_manifest(model, out, entries, settings.language, {"model": made_by, "harness": harness})


@contextmanager
def _asking(
    parameters: EvaluateRun, model: Path, data: Path, pending: list[Benchmark]
) -> Iterator[tuple["Runner", Predict]]:
    """The model, loaded, and the harness around it, with a bar that counts the questions of `pending`."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harnesses' own bars
    os.environ.setdefault("LMEVAL_HASHMM", "0")  # lm-eval's search for images to hash in rows, which hold none
    import torch

    from grace.data import load_features
    from grace.evaluate.runner import Runner
    from grace.models import load_model, load_processor, vision_tower

    settings, share = parameters.evaluation, Share()
    total = sum(entry.size if settings.limit is None else min(entry.size, settings.limit) for entry in pending)
    with progress(f"evaluating {model}", total) if share.first else nullcontext(lambda steps: None) as advance:
        loaded = load_model(model, device=f"cuda:{share.local}" if torch.cuda.is_available() else "cpu")
        kept = load_features(data / "benchmarks" / FEATURES, vision_tower(loaded))
        runner = Runner(loaded, load_processor(model), settings.batch, settings.max_new_tokens, kept)
        yield runner, importlib.import_module(ADAPTERS[settings.harness]).predictor(runner, settings, advance)


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


def _write_manifest(model: Path, out: Path, entries: list[Benchmark], texts: list[str], about: dict) -> None:
    """Sum up the predictions; files of benchmarks that are no longer asked for go."""
    benchmarks, language, answered = {}, {}, False
    for entry in entries:
        path = out / f"{entry.name}.parquet"
        rows = read_rows(path)
        answered |= bool(rows["prediction"].str.strip().ne("").any())
        benchmarks[entry.name] = {"file": path.name, "sha256": sha256(path), **summary(entry, rows)}
    if not answered:
        raise GraceError(
            f"{model}: answered nothing to any question of any benchmark; check its training log, and that "
            "its chat template is the one it was trained with"
        )
    for task in texts:
        path = text_file(out, task)
        language[task] = {"file": path.relative_to(out).as_posix(), "sha256": sha256(path), **text_summary(path)}
    wanted = {out / entry["file"] for entry in (*benchmarks.values(), *language.values())}
    for path in out.rglob("*.parquet"):
        if path not in wanted:
            path.unlink()
    shutil.rmtree(out / PARTS, ignore_errors=True)
    manifest = {**about, "benchmarks": benchmarks} | ({"language": language} if language else {})
    kept = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
    if kept != {**manifest, "environment": kept.get("environment")}:
        write_json(out / MANIFEST, {**manifest, "environment": environment()})
