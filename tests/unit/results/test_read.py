"""Reading an experiment's predictions and measurements, whole, in part and damaged."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from fake_results import LEVELS, MIRRORS, change_rows, results_folder

from grace.errors import GraceError
from grace.results.read import (
    BASELINE,
    TEACHER,
    Row,
    read_bench,
    read_predictions,
    read_predictions_manifest,
    read_results,
)

__all__ = ["results_folder"]  # a fixture


@pytest.fixture(scope="module")
def results(results_folder):
    return read_results(results_folder)


def test_rows_seeds_and_benchmarks_come_in_the_configs_order(results):
    assert list(results.seeds)[:2] == [TEACHER, BASELINE]
    assert results.seeds[TEACHER] == (0,) and results.seeds[BASELINE] == (0, 1)
    assert {(row.recipe, row.precision) for row in results.seeds} == set(LEVELS)
    assert results.mirrors == MIRRORS


def test_scores_are_the_files_own(results, results_folder):
    row = Row("grace", "int4")
    direct = pd.read_parquet(results_folder / "students/grace/int4/seed1/predictions/colour.parquet")
    found = results.scores(row, "colour")
    assert found.values[1].tolist() == (100 * direct["score"]).tolist()
    assert len(set(zip(found.images, direct["image_id"], strict=True))) == direct["image_id"].nunique() == 40


def test_decoding_tables_of_before_there_was_a_choice_of_cache(results_folder, tmp_path):
    folder = shutil.copytree(results_folder, tmp_path / results_folder.name)
    table = pd.read_csv(folder / "bench" / "decode.csv")
    table[table.cache == 16].drop(columns="cache").to_csv(folder / "bench" / "decode.csv", index=False)
    assert (read_results(folder).decode.cache == 16).all()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda f: f.drop(columns="score"), "column score is missing"),
        (lambda f: pd.concat([f, f.head(1)]), "stands twice"),
        (lambda f: f.assign(score=np.nan), "not a number"),
    ],
)
def test_damaged_predictions_are_named(tmp_path, results_folder, change, said):
    path = tmp_path / "colour.parquet"
    shutil.copy(results_folder / "teacher/predictions/colour.parquet", path)
    change_rows(path, change)
    with pytest.raises(GraceError, match=f"colour.parquet: .*{said}"):
        read_predictions(path)


def test_missing_pieces_are_named(tmp_path, results_folder):
    with pytest.raises(GraceError, match=r"config/experiment\.json: no such file"):
        read_results(tmp_path)
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(GraceError, match="not a readable Parquet"):
        read_predictions(tmp_path / "text.parquet")
    folder = tmp_path / "part"
    shutil.copytree(results_folder, folder)
    shutil.rmtree(folder / "students/grace/int4/seed1/predictions")
    with pytest.raises(GraceError, match=r"students/grace/int4/seed1/predictions/manifest\.json: no such file"):
        read_results(folder)
    assert read_results(folder, partial=True).seeds[Row("grace", "int4")] == (0,)
    change_rows(folder / "students/kd/int4/seed0/predictions/colour.parquet", lambda f: f.head(50))
    part = read_results(folder, partial=True)
    assert part.missing == ["grace int4 seed 1"]
    part.scores(TEACHER, "colour")
    with pytest.raises(GraceError, match="50 questions that are not the 80"):
        part.scores(Row("kd", "int4"), "colour")
    (folder / "bench/decode.csv").write_text("model,precision\n")
    with pytest.raises(GraceError, match=r"decode\.csv: column device, batch"):
        _ = read_results(folder, partial=True).decode


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        ("decode", "\n", ",7,7,7\n", "not a readable CSV file"),
        ("decode", "grace", "\udcff", "not a readable CSV file"),
        ("kernel", "\n", "many\n", "column relative_error holds something that is no number"),
    ],
)
def test_damaged_measurements_are_named(tmp_path, results_folder, name, old, new, said):
    """Like a file that a disk or an editor has damaged in its last line."""
    path = shutil.copytree(results_folder / "bench", tmp_path / "bench") / f"{name}.csv"
    before, _, after = path.read_text().rpartition(old)
    path.write_bytes(f"{before}{new}{after}".encode(errors="surrogateescape"))
    with pytest.raises(GraceError, match=f"bench/{name}.csv: {said}.*run the benchmark again"):
        read_bench(tmp_path, name)


@pytest.mark.parametrize(
    "damaged, said",
    [
        ({"benchmarks": None}, "`benchmarks`: input should be a valid dictionary"),
        ({"benchmarks": {"colour": {"score": "high", "questions": 8}}}, "`benchmarks.colour.score`: input should be"),
        ({"protocols": {"release": {"colour": {}}}}, "`protocols.release.colour.file`: field required"),
        ({"files": 3}, "not a manifest that lists its files"),
    ],
)
def test_a_damaged_manifest_of_predictions_is_named(tmp_path, results_folder, damaged, said):
    path = results_folder / "teacher/predictions/manifest.json"
    (tmp_path / "manifest.json").write_text(json.dumps({**json.loads(path.read_text()), **damaged}))
    with pytest.raises(GraceError, match=f"manifest.json: {said}"):
        read_predictions_manifest(tmp_path)
