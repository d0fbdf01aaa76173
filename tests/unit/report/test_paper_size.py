"""Tables and page of an experiment of the paper's size: fourteen benchmarks in their own scales, a model missing."""

import numpy as np
import pandas as pd
import pytest

from grace.benchmarks.registry import PAPER
from grace.config.load import load_experiment
from grace.files import sha256, write_json, write_manifest
from grace.report import commands
from grace.report.tables.table import markdown
from grace.report.tables.write import build_tables
from grace.results.read import BASELINE, TEACHER, Row, read_results

LEVELS = {"teacher": 0.8, "baseline": 0.7, "grace": 0.78, "rtn": 0.66, "finetune": 0.7}
MME = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")


def questions(name: str) -> pd.DataFrame:
    """Ids, images and groups as the harness of that benchmark gives them."""
    if name == "mme":
        pairs = [(group, n) for group in (*MME, "code_reasoning") for n in range(30)]
        rows = [(f"{g}/{n}-{k}", f"{g}/{n}", g) for g, n in pairs for k in range(2)]
    elif name == "mmbench":
        rows = [(str(n + turn * 1_000_000), str(n), "") for n in range(100) for turn in range(2 + n % 3)]
    elif name == "hallusionbench":
        rows = [
            (f"VD_chart_{s}_{f}_{q}", f"{s}/{f}", "VD chart") for s in range(30) for f in range(3) for q in range(2)
        ]
    else:
        rows = [(f"{name}/{n}", f"{name}/{n // 2}", "") for n in range(200)]
    return pd.DataFrame(rows, columns=["sample_id", "image_id", "group"])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    config = load_experiment("workflow/experiments/llava15_7b.yaml").model_dump(mode="json")
    config["evaluation"]["benchmarks"] = [benchmark.name for benchmark in PAPER][::-1]
    config |= {"baseline_seeds": [0, 1], "bench": config["bench"] | {"recipe": "grace"}}
    config["runs"] = [
        {"recipes": ["finetune", "grace"], "precisions": ["bf16", "int4"], "seeds": [0, 1]},
        {"recipes": ["rtn"], "precisions": ["int4"], "seeds": [0]},
    ]
    folder = tmp_path_factory.mktemp("paper") / "llava15_7b"
    write_json(folder / "config" / "experiment.json", config)
    models = [(TEACHER, 0), (BASELINE, 0), (BASELINE, 1), (Row("rtn", "int4"), 0)]
    models += [(Row(r, p), s) for r in ("finetune", "grace") for p in ("bf16", "int4") for s in (0, 1)]
    models.remove((Row("grace", "bf16"), 1))  # still running
    for order, (row, seed) in enumerate(models):
        out = folder / row.folder(seed) / "predictions"
        out.mkdir(parents=True)
        about = {}
        for place, benchmark in enumerate(PAPER):
            asked = questions(benchmark.name)
            hard = np.random.default_rng(place).normal(0, 0.2, len(asked))
            luck = np.random.default_rng([order, place]).normal(0, 0.15, len(asked))
            right = (LEVELS[row.recipe] + hard + luck > 0.5) * 1.0
            if benchmark.metric == "vqa_accuracy":
                right = np.where(right > 0, np.random.default_rng(place).choice([0.6, 1.0], len(asked)), 0.0)
            answers = {
                "prediction": "yes",
                "extracted": np.where(right > 0, "yes", "no"),
                "target": "yes",
                "score": right,
            }
            asked.assign(**answers, logprob=np.nan, entropy=np.nan).to_parquet(out / f"{benchmark.name}.parquet")
            name = f"{benchmark.name}.parquet"
            about[benchmark.name] = {
                "file": name,
                "sha256": sha256(out / name),
                "questions": len(asked),
                "score": float(right.mean()),
                "seconds": 60.0,
            }
        write_manifest(out, model="0" * 64, harness={"name": "lmms-eval", "version": "0.7.3"}, benchmarks=about)
    return read_results(folder, partial=True)


@pytest.fixture(scope="module")
def tables(results):
    return {table.name: table for table in build_tables(results)}


def test_columns_come_in_the_papers_order_under_its_names(tables):
    assert tables["table1"].columns[:8] == [
        "VQAv2", "GQA", "TextVQA", "VizWiz", "POPE", "ScienceQA-IMG", "MME", "MMBench"
    ]  # fmt: skip
    assert (
        tables["table1"].columns[-3:] == ["average", "Δ average", "detectable Δ"]
        and len(tables["table1"].columns) == 17
    )


def test_mme_is_a_score_and_stays_out_of_the_average(results, tables):
    line = next(line for line in tables["table1"].lines if line.heads[0] == "Teacher")
    cells = dict(zip(tables["table1"].columns, line.cells, strict=True))
    assert 1200 < cells["MME"].value < 2000 and cells["MME"].paper == 1531.3 and 5 < cells["MME"].stderr < 60
    others = [cells[name].value for name in tables["table1"].columns[:-3] if name != "MME"]
    assert cells["average"].value == pytest.approx(np.mean(others)) and max(others) <= 100
    text = markdown(tables["table1"])
    assert "13 benchmarks other than MME; the paper's is that of VQAv2, GQA" in text
    assert "MME: its score over perception" in text and "MMBench: circular accuracy" in text
    assert "demo" not in text and "llava-1.5-13b-hf to llava-1.5-7b-hf, on sharegpt4v_mix665k" in text


def test_circular_accuracy_counts_a_question_once_for_all_its_orders(results):
    rows = pd.read_parquet(results.folder / "teacher/predictions/mmbench.parquet")
    whole = rows.groupby(rows["sample_id"].astype(int) % 1_000_000)["score"].min()
    assert results.estimate(TEACHER, "mmbench").value == pytest.approx(100 * whole.mean())
    assert results.estimate(TEACHER, "mmbench").value < 100 * rows["score"].mean() - 3


def test_measures_hold_the_plain_accuracies(tables):
    assert "mme accuracy" in tables["measures"].columns and "pope F1" in tables["measures"].columns


def test_the_page_is_built_without_images_or_benchmarks_of_speed(results, tmp_path):
    commands.figures(results.folder, tmp_path / "figures")
    commands.tables(results.folder, tmp_path / "tables")
    commands.speed(results.folder, results.folder / "speed")
    (tmp_path / "figures").rename(results.folder / "figures")
    commands.page(results.folder, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert "demo models" not in text
    assert "Partial results: 1 set of predictions is not here (grace bf16 seed 1)" in text
    assert "llava-hf/llava-1.5-13b-hf" in text and "lmms-eval 0.7.3" in text
