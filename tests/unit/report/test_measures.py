"""Tables beside the scores: metrics other than the mean, protocols, questions of training images."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from grace.benchmarks.metrics import mme
from grace.report.tables.benchmark_metrics import jackknife
from grace.report.tables.overlap import overlap_table
from grace.report.tables.protocols import protocols_table
from grace.results.read import Row, read_results


def test_the_jackknife_of_a_mean_is_its_standard_error():
    random = np.random.default_rng(0)
    seeds = [pd.DataFrame({"image_id": np.arange(4000), "score": random.normal(size=4000)}) for _ in range(3)]
    value, stderr = jackknife(seeds, lambda rows: rows["score"].mean())
    assert value == pytest.approx(np.mean([rows["score"].mean() for rows in seeds]))
    assert 0.4 < stderr / (1 / np.sqrt(3 * 4000)) < 1.8  # ten groups: a rough estimate
    shifted = [rows.assign(score=rows["score"] + 3 * seed) for seed, rows in enumerate(seeds)]
    assert jackknife(shifted, lambda rows: rows["score"].mean())[1] == pytest.approx(3 / np.sqrt(3), rel=0.05)
    assert jackknife([rows.assign(image_id=0) for rows in seeds], len)[1] == float("inf")


def test_measures_are_the_registrys_metrics(results, tables, results_folder):
    line = next(line for line in tables["measures"].lines if line.heads == ["GRACE", "int4"])
    expected = [
        mme(pd.read_parquet(results_folder / f"students/grace/int4/seed{seed}/predictions/pairs.parquet"))["score"]
        for seed in (0, 1)
    ]
    assert tables["measures"].columns == ["presence F1", "pairs score"]
    assert line.cells[1].value == pytest.approx(np.mean(expected)) and line.cells[1].stderr > 0


def test_what_the_protocol_changes(tmp_path, results_folder):
    assert "No benchmark was asked" in protocols_table(read_results(results_folder)).notes[0]
    folder = shutil.copytree(results_folder, tmp_path / "two")
    for seed in (0, 1):
        below = folder / f"students/grace/int4/seed{seed}/predictions"
        (below / "protocols/release").mkdir(parents=True)
        frame = pd.read_parquet(below / "colour.parquet").head(40)
        frame.assign(score=np.arange(40) % 4 == 0).astype({"score": float}).to_parquet(
            below / "protocols/release/colour.parquet"
        )
        manifest = json.loads((below / "manifest.json").read_text())
        manifest["benchmarks"]["colour"]["protocol"] = "paper"
        manifest["protocols"] = {"release": {"colour": {"file": "protocols/release/colour.parquet"}}}
        (below / "manifest.json").write_text(json.dumps(manifest))
    two = read_results(folder)
    table = protocols_table(two)
    assert table.columns == ["colour: single", "colour: paper", "colour: release"]
    cells = {tuple(line.heads): line.cells for line in table.lines}
    paper, release = cells["GRACE", "int4"][1:]
    assert release.value == 25 and release.stderr > 0
    assert paper.value == two.estimate(Row("grace", "int4"), "colour").value
    assert cells["QAT", "int4"][0].value and cells["QAT", "int4"][1].value is None


def test_scores_on_the_clean_questions_stand_beside_the_whole(tmp_path, results_folder):
    assert "were not looked for" in overlap_table(read_results(results_folder)).notes[0]
    folder = shutil.copytree(results_folder, tmp_path / "seen")
    row, results = Row("grace", "int4"), read_results(folder)
    first = results.predictions(row, 0, "colour")
    seen = first["sample_id"].tolist()[:30]
    entry = {
        "questions": len(first),
        "unreadable": 1,
        "exact_count": 10,
        "near_count": 20,
        "exact": seen[:10],
        "near": seen[10:],
    }
    none = {"questions": 9, "unreadable": 0, "exact_count": 0, "near_count": 0, "exact": [], "near": []}
    about = {"near_bits": 3, "training_images": 5000, "benchmarks": {"colour": entry, "presence": none}}
    (folder / "overlap.json").write_text(json.dumps(about))
    table = overlap_table(read_results(folder))
    assert table.columns == [results.mirrors["colour"], f"{results.mirrors['colour']}, clean"]
    cells = {tuple(line.heads): line.cells for line in table.lines}
    whole, clean = cells["GRACE", "int4"]
    frames = [results.predictions(row, seed, "colour") for seed in results.seeds[row]]
    assert whole.value == pytest.approx(100 * np.mean([frame["score"].mean() for frame in frames]))
    kept = [frame[~frame["sample_id"].isin(seen)]["score"].mean() for frame in frames]
    assert clean.value == pytest.approx(100 * np.mean(kept)) and clean.value != whole.value
    assert any(
        "10 show the very file of a training image and 20 nearly" in note and "images of 1 could not" in note
        for note in table.notes
    )
    entry["near"] = first["sample_id"].tolist()
    (folder / "overlap.json").write_text(json.dumps(about))
    assert overlap_table(read_results(folder)).lines[0].cells[1].text == "none left"
    about["benchmarks"] = {"presence": none}
    (folder / "overlap.json").write_text(json.dumps(about))
    assert overlap_table(read_results(folder)).notes[0] == "No question of any benchmark shows a training image."
