"""What is missing is said before the first job: one sentence each, all at once, and nothing where all is in place."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import grace.config.preflight as preflight
from grace import families
from grace.config.load import load_experiment, load_files
from grace.config.schema import Experiment
from grace.errors import GraceError

IDS = {"<s>": 1, "a": 2}


def write_model(folder: Path, rows: int = 8, image: int = 3, model_type: str = "llava") -> None:
    folder.mkdir()
    config = {
        "model_type": model_type,
        "image_token_index": image,
        "text_config": {"vocab_size": rows, "hidden_size": 128},
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {"model": {"vocab": IDS}, "added_tokens": [{"content": "<image>", "id": 3}]}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def write_rows(path: Path, count: int = 6, **columns: str) -> None:
    pq.write_table(pa.table({name: [value] * count for name, value in columns.items()}), path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for role in ("teacher", "student"):
        write_model(tmp_path / role)
    (tmp_path / "mix.json").write_text("[{}]")
    (tmp_path / "images").mkdir()
    (tmp_path / "benchmarks").mkdir()
    write_rows(tmp_path / "benchmarks/pope.parquet", question="?", answer="yes", image="x")
    (tmp_path / "benchmarks/mmbench.tsv").write_text("index\tquestion\tanswer\tA\tB\timage\n")
    return tmp_path


def experiment(place: Path, **more) -> Experiment:
    evaluation = {"benchmarks": ["pope", "mmbench"], "harness": "grace", "limit": 6, **more.pop("evaluation", {})}
    return load_experiment(
        {
            "experiment": "own",
            "data": {
                "source": "files", "benchmarks": str(place / "benchmarks"),
                "sources": [{"path": str(place / "mix.json"), "images": str(place / "images")}],
            },
            "teacher": {"pretrained": str(place / "teacher")},
            "student": {"pretrained": str(place / "student")},
            "finetune": {"epochs": 1, "learning_rate": 1e-3},
            "runs": [{"recipes": ["grace"], "precisions": ["int4"], "seeds": [0]}],
            "evaluation": evaluation,
            **more,
        }
    )  # fmt: skip


def said(place: Path, **more) -> list[str]:
    return [problem.sentence for problem in preflight.missing(experiment(place, **more), place / "results/own")]


def test_nothing_is_said_where_all_is_in_place(place: Path) -> None:
    assert said(place) == []


def test_everything_that_is_missing_is_said_at_once(place: Path) -> None:
    (place / "mix.json").unlink()
    (place / "images").rmdir()
    (place / "benchmarks/pope.parquet").unlink()
    (place / "teacher/model.safetensors").unlink()
    (place / "student/config.json").unlink()
    found = said(place)
    wanted = ["mix.json: no such file", "images: no such folder", "pope.parquet: no such benchmark", "no *.safetensors",
        "config.json: no such file"]  # fmt: skip
    assert len(found) == len(wanted)
    for words, sentence in zip(wanted, found, strict=True):
        assert words in sentence and "\n" not in sentence and ";" in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 3}, "its head has 3 rows and the tokenizer 4 tokens"),
        ({"image": 2}, "<image> is token 3 and config.json says 2"),
        ({"model_type": "qwen2_vl"}, "config.json says qwen2_vl and the configuration family: llava"),
        ({"model_type": "t5"}, "model_type is 't5'"),
    ],
)
def test_a_model_that_does_not_fit(place: Path, change: dict, words: str) -> None:
    (place / "student").rename(place / "whole")
    write_model(place / "student", **change)
    (sentence,) = said(place)
    assert words in sentence


def test_a_tokenizer_without_the_templates_control_tokens(place: Path) -> None:
    for role in ("teacher", "student"):
        write_model(place / f"{role}-qwen", model_type="qwen2_vl")
    more = {role: {"pretrained": str(place / f"{role}-qwen")} for role in ("teacher", "student")}
    sentence, _ = said(place, family="qwen2_vl", **more)
    assert "has no token <|image_pad|>, <|im_start|>, <|im_end|>, <|vision_start|>, <|vision_end|>; use" in sentence


def test_columns_and_counts_of_benchmarks(place: Path) -> None:
    write_rows(place / "benchmarks/pope.parquet", text="?", image="x")
    (place / "benchmarks/mmbench.tsv").write_text("index\tquestion\tA\tB\n")
    found = said(place)
    assert [sentence.split(": ")[1] for sentence in found] == [
        "column question is missing; make it a copy of the official data set",
        "column answer is missing; make it a copy of the official data set",
        "column answer is missing; make it a copy of the official data set",
    ]
    write_rows(place / "benchmarks/pope.parquet", question="?", answer="no", image="x")
    (sentence,) = said(place, evaluation={"benchmarks": ["pope"], "limit": None})
    assert "6 rows, but this protocol asks 9,000" in sentence
    (place / "benchmarks/pope.parquet").write_bytes(b"no Parquet")
    (sentence,) = said(place, evaluation={"benchmarks": ["pope"]})
    assert "not a readable Parquet file" in sentence


def test_a_benchmark_that_was_replaced_after_prepare(place: Path) -> None:
    prepared = place / "results/own/data"
    shutil.copytree(place / "benchmarks", prepared / "benchmarks")
    (prepared / "manifest.json").write_text("{}")
    assert said(place) == []
    write_rows(place / "benchmarks/pope.parquet", question="another?", answer="no", image="x")
    (sentence,) = said(place)
    assert sentence.startswith(f"{place}/benchmarks/pope.parquet: is not what `prepare` copied")
    (place / "benchmarks/pope.parquet").unlink()  # what was prepared needs no original
    assert said(place) == []


def test_harness_and_checkout(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    (sentence,) = said(place, evaluation={"harness": "lmms-eval"})
    assert "lmms-eval is not installed; bash workflow/setup.sh lmms-eval" in sentence
    (sentence,) = said(place, evaluation={"harness": "vlmeval", "vlmeval_checkout": str(place / "nowhere")})
    assert "no checkout of VLMEvalKit" in sentence


def test_a_model_of_the_hub_is_looked_for_in_its_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    teacher = {"pretrained": "some/model"}
    (sentence,) = said(place, teacher=teacher)
    assert "neither a local folder nor in the hub's cache, and HF_HUB_OFFLINE is set" in sentence
    repository = place / "hub/models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots").mkdir()
    write_model(repository / "snapshots/abc")
    assert said(place, teacher=teacher) == []
    (sentence,) = said(place, teacher={**teacher, "revision": "def"})
    assert "HF_HUB_OFFLINE" in sentence


def test_a_disk_that_is_too_small_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("", (), {"free": 3})())
    (sentence,) = said(place)
    assert "free; make room" in sentence


def test_what_was_built_needs_nothing_any_more(place: Path) -> None:
    for built in ("data", "teacher/model", "students/baseline/bf16/seed0/model"):
        (place / "results/own" / built).mkdir(parents=True)
        (place / "results/own" / built / "manifest.json").write_text("{}")
    for gone in ("mix.json", "benchmarks/pope.parquet", "teacher/config.json", "student/config.json"):
        (place / gone).unlink()
    assert said(place) == []


def test_several_files_are_merged_as_snakemake_merges_them(tmp_path: Path) -> None:
    file = Path(__file__).parents[3] / "workflow/experiments/qwen2vl_2b.yaml"
    (tmp_path / "own.yaml").write_text("teacher: {pretrained: here}\nevaluation: {limit: 3, benchmarks: [mmbench]}\n")
    merged = load_files([file, tmp_path / "own.yaml"])
    assert merged.teacher.pretrained == "here" and merged.evaluation.limit == 3
    assert merged.evaluation.benchmarks == ["mmbench"] and merged.evaluation.protocol == "lmms-eval"
    with pytest.raises(GraceError, match=r"qwen2vl_2b.yaml \+ .*own.yaml: `teacher` is"):
        (tmp_path / "own.yaml").write_text("teacher: 3\n")
        load_files([file, tmp_path / "own.yaml"])


def test_groups_divide_the_students_widths(place: Path) -> None:
    config = json.loads((place / "student/config.json").read_text())
    config["text_config"] |= {"hidden_size": 96, "num_attention_heads": 3, "head_dim": 48}
    for role in ("teacher", "student"):  # a teacher is not quantised
        (place / role / "config.json").write_text(json.dumps(config))
    said_of = f"{place / 'student'}: its decoder's"
    assert said(place) == [
        f"{said_of} hidden_size is 96, no multiple of quantization.group_size 128; lower that",
        f"{said_of} num_attention_heads x head_dim is 144, no multiple of quantization.group_size 128; lower that",
    ]
    assert len(said(place, quantization={"group_size": 32})) == 1


def test_a_model_without_its_processor(place: Path) -> None:
    for name in ("preprocessor_config.json", "tokenizer.json"):
        (place / "teacher" / name).unlink()
    teacher = place / "teacher"
    assert said(place) == [
        f"{teacher}: has no preprocessor_config.json; copy the model's image processor there",
        f"{teacher}: has no tokenizer.json, tokenizer.model or vocab.json; copy the model's tokenizer there",
    ]
    (teacher / "processor_config.json").write_text('{"image_processor": {"size": 64}}')
    (teacher / "vocab.json").write_text("{}")
    assert said(place) == []


def test_packages_that_a_tokenizer_needs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "student/tokenizer.json").rename(place / "student/tokenizer.model")
    monkeypatch.setattr(families.importlib.util, "find_spec", lambda name: None)
    assert said(place) == [
        f"{place / 'student'}: tokenizer.json is not there, and reading tokenizer.model needs sentencepiece and "
        "protobuf; pip install sentencepiece protobuf"
    ]
