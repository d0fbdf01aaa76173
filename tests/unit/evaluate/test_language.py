"""Language tasks as a config key: lm-eval's likelihoods of plain text, on local files, beside the benchmarks."""

import json
import math

import pytest
import yaml
from evaluate_models import rows, write_benchmark, write_model
from typer.testing import CliRunner

import grace.evaluate.commands as commands
from grace.cli import app
from grace.config.evaluation import Evaluation
from grace.errors import GraceError
from grace.evaluate.runner import Runner
from grace.files import sha256
from grace.models import load_model, load_processor
from grace.results.predictions import read_rows

TEXTS = ["what is the blue dress", "where is a red bag the boot is top left", "what is"]
PERPLEXITY = {
    "task": "tiny_perplexity", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
    "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}  # fmt: skip
CHOICE = {
    "task": "tiny_choice", "output_type": "multiple_choice", "doc_to_text": "text",
    "doc_to_choice": ["blue", "red bag"],
    "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "model")
    write_benchmark(tmp_path / "data/benchmarks/colour.parquet", rows(12))
    _write_texts(tmp_path, TEXTS)
    for task in (PERPLEXITY, CHOICE):
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "text.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
        }
        content = {**task, **data, "test_split": "test", "num_fewshot": 0}
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def _write_texts(folder, texts) -> None:
    lines = [json.dumps({"text": text, "gold": 1}) + "\n" for text in texts]
    (folder / "text.jsonl").write_text("".join(lines))


def _run(folder, *tasks, out="out") -> dict:
    language = [str(folder / f"{task}.yaml") for task in tasks]
    evaluation = {"benchmarks": ["colour"], "batch": 8, "max_new_tokens": 3, "language": language}
    (folder / "run.json").write_text(json.dumps({"family": "llava", "evaluation": evaluation}))
    commands.evaluate(folder / "run.json", folder / "model", folder / "data", folder / out)
    return json.loads((folder / out / "manifest.json").read_text())


def test_perplexity_and_choice_are_lm_evals_and_the_models(folder):
    manifest = _run(folder, "tiny_perplexity", "tiny_choice")
    perplexity, choice = (manifest["language"][str(folder / f"tiny_{name}.yaml")] for name in ("perplexity", "choice"))
    assert perplexity["file"] == "language/tiny_perplexity.parquet"
    listed = manifest["files"][perplexity["file"]]
    assert listed["sha256"] == sha256(folder / "out" / perplexity["file"]) and perplexity["texts"] == len(TEXTS)
    runner = Runner(load_model(folder / "model"), load_processor(folder / "model"))
    ids = [runner.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    alone = [runner.score([([2], tokens)])[0][0] for tokens in ids]
    words = [len(text.split()) for text in TEXTS]
    kept = read_rows(folder / "out" / perplexity["file"])
    for (said, count), logprob, number in zip(kept["values"], alone, words, strict=True):
        assert said == pytest.approx(logprob, abs=0.05) and count == number  # bf16; they share a batch here
    recomputed = math.exp(-sum(v[0] for v in kept["values"]) / sum(v[1] for v in kept["values"]))
    assert perplexity["results"]["tiny_perplexity"]["word_perplexity"] == pytest.approx(recomputed)
    scores = [values[0] for values in read_rows(folder / "out" / choice["file"])["values"]]
    assert choice["results"]["tiny_choice"]["acc"] == pytest.approx(sum(scores) / 3)


def test_only_a_changed_task_is_run_again_and_no_benchmark(folder, monkeypatch):
    first = _run(folder, "tiny_perplexity", "tiny_choice")
    monkeypatch.setattr(commands, "score_text", lambda *_: pytest.fail("scored again"))
    assert _run(folder, "tiny_perplexity", "tiny_choice") == first
    assert list(_run(folder, "tiny_choice")["language"]) == [str(folder / "tiny_choice.yaml")]
    assert not (folder / "out/language/tiny_perplexity.parquet").exists()
    monkeypatch.undo()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    asked, real = [], commands.score_text
    monkeypatch.setattr(
        commands, "score_text", lambda runner, task, limit: asked.append(task) or real(runner, task, limit)
    )
    _write_texts(folder, TEXTS[:2])
    changed = _run(folder, "tiny_choice")
    assert len(asked) == 1 and changed["language"][asked[0]]["texts"] == 2
    assert changed["benchmarks"] == first["benchmarks"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda f: (f / "tiny_choice.yaml").unlink(),
            r"tiny_choice\.yaml: no such file; give lm-eval's name or a YAML",
        ),
        (lambda f: (f / "tiny_choice.yaml").write_text("a: ["), r"tiny_choice\.yaml: not valid YAML"),
        (
            lambda f: (f / "tiny_choice.yaml").write_text("a: b"),
            r"tiny_choice\.yaml: `task` is not as lm-eval.s format asks",
        ),
        (lambda f: (f / "text.jsonl").unlink(), r"text\.jsonl: no such file; mend dataset_kwargs\.data_files"),
        (lambda f: (f / "text.jsonl").write_text('{"text": '), r"lm-eval could not run `.*tiny_choice\.yaml` \("),
    ],
    ids=["no file", "no yaml", "no task", "no data", "broken data"],
)
def test_what_is_wrong_is_said_and_the_benchmarks_are_kept(folder, damage, said):
    damage(folder)
    with pytest.raises(GraceError, match=said):
        _run(folder, "tiny_choice")
    assert [path.name for path in (folder / "out").glob("*.parquet")] == ["colour.parquet"]


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="language names `wiki` twice"):
        Evaluation(benchmarks=["colour"], language=["a/wiki.yaml", "b/wiki.yaml"])


def test_one_process_asks_several_models_and_one_failure_stops_no_other(folder):
    _run(folder, out="alone")
    write_model(folder / "other", seed=1)
    pairs = [
        word
        for name in ("model", "missing", "other")
        for word in ("--model", str(folder / name), "--out", str(folder / f"of-{name}"))
    ]
    (folder / "missing").mkdir()
    done = CliRunner().invoke(
        app, ["evaluate", "--run", str(folder / "run.json"), "--data", str(folder / "data"), *pairs]
    )
    assert isinstance(done.exception, GraceError) and "missing" in str(done.exception)
    assert read_rows(folder / "of-model/colour.parquet").equals(read_rows(folder / "alone/colour.parquet"))
    assert (folder / "of-other/manifest.json").is_file() and not (folder / "of-missing/manifest.json").exists()
    done = CliRunner().invoke(
        app, ["evaluate", "--run", "r", "--data", "d", "--model", "m", "--model", "n", "--out", "o"]
    )
    assert "--model is given 2 times and --out 1 times" in str(done.exception)
