"""`grace evaluate`: every benchmark of a run for one model, in one process."""

import importlib
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from grace.benchmarks.protocols import Spec
from grace.benchmarks.registry import ADAPTERS, GRACE, Benchmark
from grace.config.job_parameters import EvaluateRun
from grace.errors import GraceError
from grace.evaluate import summed_up
from grace.evaluate.answer_log import AnswerLog
from grace.evaluate.asked import PROTOCOLS, Asked, Task
from grace.evaluate.language import score_text, text_summary, write_text_scores
from grace.evaluate.language_tasks import text_file
from grace.evaluate.rows import read_items
from grace.evaluate.submissions import SUBMISSIONS, submission_file, write_submission
from grace.files import MANIFEST, list_files, write_manifest
from grace.progress import progress
from grace.results.predictions import RowsFailed, finished, known_answers, read_rows, summary, write_predictions
from grace.world import this_world

if TYPE_CHECKING:
    from grace.evaluate.runner import Runner

PARTS = ".parts"  # answers of a benchmark that is being asked
FEATURES = "features.safetensors"  # what the frozen tower makes of the benchmarks' images, where it was kept
Predict = Callable[[Benchmark, Path, Spec], pd.DataFrame]


def evaluate(run: Path, model: Path, data: Path, out: Path, manifest: bool = True) -> None:
    """Ask a model every question of every benchmark; write `out/{benchmark}.parquet` and, last, `out/manifest.json`.

    A benchmark whose predictions are there and were made by the same model, questions, settings, harness, code and
    instructions is not asked again; with none left, neither the model nor the harness is loaded. Answers to a benchmark
    are kept as they come, so that a killed job goes on in the middle of one. A benchmark that fails, by whatever
    exception, does not stop the others: their predictions are kept, and a `GraceError` at the end names what failed.

    Started by torchrun, all processes call it: they share the questions, and the first one writes.

    Args:
        run: frozen parameters (`EvaluateRun`).
        model: model folder, plain or packed, with its processor.
        data: data folder with `benchmarks/{name}.parquet` (a file, or a folder of shards) or `.tsv` in VLMEvalKit's
            format; `benchmarks/{protocol}/{name}...` where a protocol asks another split.
        out: predictions folder.
        manifest: whether to write it; otherwise it is kept for the model's own job to take over (`summed_up`).
    """
    asked, world = Asked(run, model, data), this_world()
    settings, tasks = asked.parameters.evaluation, asked.tasks
    out.mkdir(parents=True, exist_ok=True)
    if world.first:
        summed_up.drop(out)
    failed, keys = [], {}

    @contextmanager
    def kept_apart(title: str) -> Iterator[None]:
        """Whatever is raised about one benchmark is noted, and stops no other."""
        try:
            yield
        except GraceError as error:
            failed.append(str(error))
        except Exception as error:
            traceback.print_exc()
            reason = (str(error).strip() or "no message").splitlines()[0]
            failed.append(f"{title}: {type(error).__name__}: {reason}; the log has the traceback, please report it")

    for task in tasks:
        with kept_apart(task.title):
            keys[task.title] = asked.key(task)
    texts = {}
    for task in settings.language:
        with kept_apart(task):
            texts[task] = asked.text_key(task)
    pending = [task for task in tasks if task.title in keys and not _done(out, task, keys[task.title])]
    untold = [task for task, key in texts.items() if not finished(text_file(out, task), key)]
    pending, untold = world.agreed((pending, untold))
    if world.first and (pending or untold or failed):
        (out / MANIFEST).unlink(missing_ok=True)
    if pending or untold:
        with _asking(asked.parameters, model, data, pending) as (runner, predict):
            for task in pending:
                with kept_apart(task.title):
                    _ask(runner, predict, task, asked, out, keys[task.title])
            for task in untold:
                with kept_apart(task):
                    found = score_text(runner, task, settings.limit)
                    if world.first:
                        write_text_scores(text_file(out, task), found, texts[task])
    world.barrier()  # what ends with an error ends the others: the first process has written what it has
    if failed:
        every = len(tasks) + len(settings.language)
        raise GraceError(f"{len(failed)} of {every} benchmarks failed, the others are kept: " + "; ".join(failed))
    if world.first:
        about = _sum_up(asked, model, out)
        if manifest:
            write_manifest(out, **about)
        else:
            summed_up.keep(out, asked.key_of_all(), about)


def _ask(runner: "Runner", predict: Predict, task: Task, asked: Asked, out: Path, key: str) -> None:
    """Ask the questions of one benchmark's file and write its predictions; answers are kept as they come.

    Args:
        key: the `prediction_key` of what is written.

    Raises:
        RowsFailed: some rows cannot be asked; the answers to the others are kept for the next time.
    """
    start, world, parts = time.monotonic(), this_world(), out / PARTS / key
    settings, path, answers = asked.parameters.evaluation, asked.questions(task), asked.answers
    log = runner.log = AnswerLog(parts, world.rank)
    runner.known = world.agreed(known_answers(out, answers) if settings.harness == GRACE else {})
    try:
        rows = predict(task.entry, path, task.spec)
    except RowsFailed as error:  # the others' answers serve once these rows are mended
        if world.first and len(error.rows):
            write_predictions(parts / f"{task.entry.name}.parquet", error.rows, "", task.protocol, answers)
        raise
    if not world.first:
        return
    if task.spec.hidden:  # the older file is of other answers
        submission_file(out, task.entry.name, task.protocol).unlink(missing_ok=True)
    write_predictions(_predictions(out, task), rows, key, task.protocol, answers)
    if task.spec.hidden:
        found = read_items(path, task.entry, task.spec, settings.limit)
        items = (item for _, item in found if not isinstance(item, str))
        write_submission(out, task.entry.name, task.protocol, rows, items)
    print(f"{task.title}: {len(rows)} questions in {time.monotonic() - start:.1f} s", flush=True)
    log.drop()


def _predictions(out: Path, task: Task) -> Path:
    """Where a task's predictions go; those without scores stand with the submissions, where no table looks."""
    return out / SUBMISSIONS / task.protocol / f"{task.entry.name}.parquet" if task.spec.hidden else out / task.file


def _done(out: Path, task: Task, key: str) -> bool:
    """Whether a task's predictions stand, and the file for its server."""
    there = not task.spec.hidden or submission_file(out, task.entry.name, task.protocol).is_file()
    return there and finished(_predictions(out, task), key)


@contextmanager
def _asking(
    parameters: EvaluateRun, model: Path, data: Path, pending: list[Task]
) -> Iterator[tuple["Runner", Predict]]:
    """The model, loaded, and the harness around it, with a bar that counts the questions of `pending`."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harnesses' own bars
    os.environ.setdefault("LMEVAL_HASHMM", "0")  # lm-eval's search for images to hash in rows, which hold none

    from grace.data import load_features
    from grace.evaluate.runner import Runner
    from grace.infer.load import load_for_inference
    from grace.models import load_model, load_processor, vision_tower
    from grace.teacher.forward import check_sight_alone

    settings, world = parameters.evaluation, this_world()
    asks = importlib.import_module(ADAPTERS[settings.harness])
    sizes = [task.spec.size for task in pending]
    total = sum(size if settings.limit is None else min(size, settings.limit) for size in sizes)
    with progress(f"evaluating {model}", total) if world.first else nullcontext(lambda steps: None) as advance:
        if settings.engine == "vllm":
            from grace.evaluate.engine_vllm import VllmRunner

            with VllmRunner.of_folder(model, settings.batch) as vllm:
                yield vllm, asks.predictor(vllm, settings, advance)
            return
        if world.device.type == "cuda":  # packed weights are decoded as they ship
            loaded = load_for_inference(model, device=str(world.device))
        else:
            loaded = load_model(model)
        kept = load_features(data / "benchmarks" / FEATURES, vision_tower(loaded))
        processor = load_processor(model)
        check_sight_alone(loaded, processor)
        runner = Runner(loaded, processor, settings.batch, kept=kept)
        yield runner, asks.predictor(runner, settings, advance)


def _sum_up(asked: Asked, model: Path, out: Path) -> dict[str, Any]:
    """What the manifest says of the predictions; files of benchmarks that are no longer asked for go."""
    settings = asked.parameters.evaluation
    benchmarks: dict[str, dict] = {}
    others: dict[str, dict[str, dict]] = {}
    submissions: dict[str, dict[str, dict]] = {}
    language, answered = {}, False
    wanted = set()
    for task in asked.tasks:
        path = _predictions(out, task)
        rows = read_rows(path)
        answered |= bool(rows["prediction"].str.strip().ne("").any())
        entry: dict[str, Any] = {"file": path.relative_to(out).as_posix()}
        wanted.add(path)
        if task.spec.hidden:
            entry |= {"protocol": task.protocol, "questions": len(rows), "of": task.spec.size}
            submissions.setdefault(task.protocol, {})[task.entry.name] = entry
        elif task.file.startswith(PROTOCOLS):
            others.setdefault(task.protocol, {})[task.entry.name] = {
                **entry, **summary(task.protocol, task.spec, rows, settings.limit)
            }  # fmt: skip
        else:
            benchmarks[task.entry.name] = {**entry, **summary(task.protocol, task.spec, rows, settings.limit)}
    if not answered:
        raise GraceError(
            f"{model}: answered nothing to any question of any benchmark; check its training log, and that "
            "its chat template is the one it was trained with"
        )
    for task in settings.language:
        path = text_file(out, task)
        wanted.add(path)
        language[task] = {"file": path.relative_to(out).as_posix(), **text_summary(path)}
    for path in out.rglob("*.parquet"):
        if path not in wanted:
            path.unlink()
    shutil.rmtree(out / PARTS, ignore_errors=True)
    parts = {"protocols": others, "submissions": submissions, "language": language}
    parts = {name: part for name, part in parts.items() if part}
    about = {"model": asked.model, "harness": asked.harness, "benchmarks": benchmarks}
    return {"files": list_files(out), **about, **parts}
