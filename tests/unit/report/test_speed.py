"""Deployment's table and metrics.json: what was timed stands apart from what another machine computes again."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from grace.files import write_manifest
from grace.report.claims import findings
from grace.report.metrics import metrics, write_metrics
from grace.report.speed import speed_metrics, write_speed
from grace.report.tables.deployment import deployment_table
from grace.report.tables.write import write_tables
from grace.results.read import read_results


def test_deployment_ratios(results):
    table = deployment_table(results)
    line = next(line for line in table.lines if line.heads == ["GRACE", "int4"] and line.cells[0].value == 8)
    assert line.cells[4].value == pytest.approx(620 / 500)
    assert line.cells[5].value == pytest.approx(0.5)
    assert any(line.heads[0] == "kernel cpu-int4" for line in table.lines)


def test_metrics_are_plain_json_with_stable_names(results):
    found = metrics(results)
    assert json.loads(json.dumps(found)) == found
    assert set(found["scores"]["grace"]) == {"bf16", "int4", "int2", "int4-outliers"}
    assert found["teacher_minus_baseline"] == pytest.approx(
        found["scores"]["teacher"]["average"] - found["scores"]["baseline"]["bf16"]["average"]
    )
    timed = speed_metrics(results)
    assert json.loads(json.dumps(timed)) == timed and not found.keys() & timed.keys()
    assert timed["decode"]["grace int4"]["batch8"]["tokens_per_second"] == 4960
    assert timed["decode"]["grace int4"]["batch8_cache8"]["tokens_per_second"] == 5600
    assert timed["kernel_speedup"]["cpu-int4"] == {"m1": 1.5, "m8": 2.2}


def test_no_table_and_no_metric_has_a_time_in_it(tmp_path, results_folder):
    """Two machines that gave the same answers in other times: the same bytes but for what names the machine."""
    slower = shutil.copytree(results_folder, tmp_path / "slower")
    for name, column in (("kernel", "speedup"), ("decode", "tokens_per_second")):
        frame = pd.read_csv(slower / f"bench/{name}.csv")
        frame.assign(**{column: frame[column] / 7}).to_csv(slower / f"bench/{name}.csv", index=False)
    for path in slower.rglob("environment.json"):
        path.write_text("{}")
    made = []
    for folder in (results_folder, slower):
        found, out = read_results(folder), tmp_path / f"made-{folder.name}"
        write_tables(found, out / "tables")
        write_metrics(found, out / "metrics.json")
        write_speed(found, out / "speed")
        kept = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "environment.json"]
        made.append({path.relative_to(out).as_posix(): path.read_bytes() for path in kept})
    differing = {name for name in made[0].keys() | made[1].keys() if made[0].get(name) != made[1].get(name)}
    assert differing and all(name.startswith("speed/") for name in differing), differing


def test_metrics_are_rounded_by_who_shows_them_alone(results):
    found = metrics(results)
    averages = {row: results.estimate(row) for row in results.rows()}
    for row, average in averages.items():
        assert found["scores"][row.recipe][row.precision]["average"] == average.value
    for item in findings(results):
        said = found["claims"][item.claim.text]
        assert (said["difference"], said["stderr"]) == (item.comparison.difference, item.comparison.stderr)


def test_the_cache_of_a_decoding_row_is_said(results):
    bits = [line.heads[1] for line in deployment_table(results).lines if line.group == "Decoding"]
    assert bits.count("int4, 8-bit cache") == bits.count("int4") == 2


def test_weight_files_are_weighed_by_their_headers(tmp_path, results_folder):
    folder = tmp_path / "packed"
    shutil.copytree(results_folder, folder)
    layer = "model.language_model.layers.0.mlp.up_proj.weight"
    for below, wide in (("students/baseline/bf16/seed0/model", 1024), ("students/grace/int4/seed0/packed", 256)):
        (folder / below).mkdir(exist_ok=True)
        tensors = {layer: np.zeros((1024, wide), np.float16), "lm_head.weight": np.zeros((512, 1024), np.float16)}
        save_file(tensors, folder / below / "model.safetensors")
        write_manifest(folder / below)
    lines = [line for line in deployment_table(read_results(folder)).lines if line.group.startswith("Weight files")]
    assert [[line.heads[0], line.cells[1].value, line.cells[5].value] for line in lines] == [
        ["Baseline", 3, 1], ["GRACE", 1.5, 0.5], ["Baseline", 2, 1], ["GRACE", 0.5, 0.25],
    ]  # fmt: skip
