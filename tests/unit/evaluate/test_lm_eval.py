"""lm-eval for real: its tasks, filters and metrics around the runner, on local files, without a network."""

import json
import os
import subprocess

import pandas as pd
import pytest
import started
from evaluate_models import model, processor, rows, write_benchmark, write_model
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.evaluator import evaluate
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager

from grace.benchmarks.extraction import extract, normalise
from grace.benchmarks.registry import benchmark
from grace.evaluate.harness_lm_eval import FILTERS, predict, task_yaml
from grace.evaluate.lm_eval_model import RunnerLM
from grace.evaluate.runner import Runner
from grace.files import read_json, whole_folder
from grace.results.predictions import SCHEMA, read_questions


@pytest.fixture(scope="module")
def lm() -> RunnerLM:
    return RunnerLM(Runner(model(), processor(), batch=8, max_new_tokens=3))


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("data") / "colour.parquet"
    write_benchmark(path, rows(20))
    return read_questions(path)


def test_rows_are_whole_ordered_and_scored_by_lm_eval(lm, questions):
    found = predict(lm, benchmark("colour"), questions, 3)
    assert list(found.columns) == SCHEMA.names
    assert found["sample_id"].tolist() == questions["id"].tolist()
    assert found["target"].tolist() == questions["answer"].tolist()
    right = [normalise(p) == normalise(t) for p, t in zip(found["prediction"], found["target"], strict=True)]
    assert found["score"].tolist() == [float(r) for r in right]
    assert (found["logprob"] <= 0).all() and (found["entropy"] >= 0).all()
    assert found["prompt_hash"].nunique() == questions["question"].nunique()
    alone = predict(lm, benchmark("colour"), questions.iloc[7:8].reset_index(drop=True), 3)
    assert alone["prediction"].tolist() == found["prediction"].tolist()[7:8]


_WORDS = st.lists(
    st.sampled_from(["yes", "no", "Yes.", "not", "A", "B.", "(C)", "a", "dog", "A,", "D:", "\n"]), max_size=5
)


@pytest.mark.parametrize("name", FILTERS)
@given(words=_WORDS)
def test_filters_are_the_extractions(name, words):
    text = " ".join(words)
    steps = [(step["function"], {k: v for k, v in step.items() if k != "function"}) for step in FILTERS[name]]
    ensemble = build_filter_ensemble(name, steps)
    instance = type("Instance", (), {"resps": [text], "doc": {}, "filtered_resps": {}})()
    ensemble.apply([instance])
    assert normalise(instance.filtered_resps[name]) == normalise(extract(name, text))


def test_language_tasks_run_through_the_same_model(lm, tmp_path):
    data = tmp_path / "text.jsonl"
    texts = ["what is the blue dress", "where is a red bag the boot is top left", "what is"]
    data.write_text(
        "".join(json.dumps({"text": text, "options": ["blue", "red bag"], "gold": 1}) + "\n" for text in texts)
    )
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)},
            "cache_dir": str(tmp_path / "cache")},
        "test_split": "test", "num_fewshot": 0,
    }  # fmt: skip
    perplexity = {
        "task": "tiny_perplexity", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
        **common,
    }  # fmt: skip
    choice = {
        "task": "tiny_choice", "output_type": "multiple_choice", "doc_to_text": "text", "doc_to_choice": "options",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **common,
    }  # fmt: skip
    tasks = TaskManager(include_defaults=False).load([perplexity, choice])
    results = evaluate(lm, tasks, bootstrap_iters=0)["results"]
    ids = [lm.tok_encode(text, add_special_tokens=False) for text in texts]
    total = sum(logprob for logprob, _ in lm.runner.score([([2], tokens) for tokens in ids]))
    words = sum(len(text.split()) for text in texts)
    assert results["tiny_perplexity"]["word_perplexity,none"] == pytest.approx(2.718281828459045 ** (-total / words))
    assert results["tiny_choice"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)


def test_long_texts_are_scored_in_windows(lm):
    tokens = [7 + i % 15 for i in range(600)]  # the model takes 256
    text = lm.tokenizer.decode(tokens)
    request = type("Request", (), {"args": (text,)})()
    (windowed,) = lm.loglikelihood_rolling([request])
    first = lm.runner.score([([2], tokens[:256])])[0][0]
    assert windowed < first < 0


@pytest.mark.slow
def test_the_command_line_of_lm_eval_gives_the_same_answers_for_a_packed_model(tmp_path, questions):
    """`lm_eval run` with its own Hugging Face model class, on the same INT4 folder and file, row by row."""
    import datasets

    from grace.models import load_model, load_processor
    from grace.quant.pack import pack
    from grace.quant.rtn import round_checkpoint

    write_model(tmp_path / "bf16")
    with whole_folder(tmp_path / "rounded") as rounded:
        round_checkpoint(tmp_path / "bf16", rounded, 4, 16, None)
    pack(tmp_path / "rounded", tmp_path / "model")
    assert "quantization_config" in read_json(tmp_path / "model/config.json")
    images = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    made = [{k: row[k] for k in images} for row in rows(20)]
    datasets.Dataset.from_list(made, features=images).to_parquet(tmp_path / "colour.parquet")
    (tmp_path / "tasks").mkdir()
    task_yaml(benchmark("colour"), tmp_path / "colour.parquet", 3, tmp_path / "tasks")
    command = started.python(
        "-m", "lm_eval", "run", "--model", "hf-multimodal",
        "--model_args", f"pretrained={tmp_path / 'model'},dtype=bfloat16", "--tasks", "grace_colour",
        "--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--batch_size", "4", "--log_samples",
        "--apply_chat_template", "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = (tmp_path / "out").rglob("samples_grace_colour*.jsonl")
    theirs = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    ours = RunnerLM(
        Runner(load_model(tmp_path / "model"), load_processor(tmp_path / "model"), batch=8, max_new_tokens=3)
    )
    found = predict(ours, benchmark("colour"), questions, 3)
    assert [sample["resps"][0][0].strip() for sample in theirs] == found["prediction"].tolist()
    assert [float(sample["exact_match"]) for sample in theirs] == found["score"].tolist()
    assert [sample["prompt_hash"] for sample in theirs] == found["prompt_hash"].tolist()
