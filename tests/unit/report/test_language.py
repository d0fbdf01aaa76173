"""The table of the language side: lm-eval's own aggregates, their errors, and what is marked."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_results import make_results

from grace.errors import GraceError
from grace.evaluate.language import SCHEMA
from grace.report.tables.language import language_table, text_points
from grace.report.tables.table import markdown
from grace.results.read import Row, read_results


def test_points_are_lm_evals_aggregates_and_errors_those_of_resampled_texts():
    from lm_eval.api.metrics import bits_per_byte, perplexity, weighted_perplexity

    random = np.random.default_rng(0)
    weight = random.integers(5, 60, 300).astype(float)
    pairs = [(-2.0 * w * random.uniform(0.5, 1.5), w) for w in weight]
    values = pd.Series([list(pair) for pair in pairs])
    assert text_points(values, "word_perplexity").mean() == pytest.approx(weighted_perplexity(pairs))
    assert text_points(values, "bits_per_byte").mean() == pytest.approx(bits_per_byte(pairs))
    single = [pair[0] / 10 for pair in pairs]
    assert text_points(pd.Series([[s] for s in single]), "perplexity").mean() == pytest.approx(perplexity(single))
    assert text_points(pd.Series([[1.0], [0.0]]), "acc").tolist() == [100, 0]
    drawn = [weighted_perplexity([pairs[n] for n in random.integers(300, size=300)]) for _ in range(400)]
    error = text_points(values, "word_perplexity").std(ddof=1) / np.sqrt(300)
    assert error == pytest.approx(np.std(drawn), rel=0.15)


@pytest.fixture
def folder(tmp_path):
    """A fake experiment with a task of two metrics; int2 is worse at it, the teacher lacks it."""
    folder = make_results(tmp_path / "fake", seeds=(0, 1, 2, 3, 4), questions=8)
    path = folder / "config/experiment.json"
    config = json.loads(path.read_text())
    config["evaluation"]["language"] = ["tasks/tiny.yaml"]
    path.write_text(json.dumps(config))
    hard = np.random.default_rng(1).uniform(1, 2, 80)
    for manifest in folder.glob("students/*/*/seed*/predictions/manifest.json"):
        worse = 1.3 if "int2" in str(manifest) else 1.0
        noise = np.random.default_rng(sum(map(ord, str(manifest)[-60:]))).normal(0, 0.02, 80)
        rows = []
        for text in range(80):
            likelihood = -20 * (hard[text] * worse + noise[text])
            rows += [
                ["tiny", str(text), "0", "acc", [float(likelihood > -30)]],
                ["tiny", str(text), "0", "word_perplexity", [likelihood, 20.0]],
            ]
        frame = pd.DataFrame(rows, columns=SCHEMA.names)
        out = manifest.parent / "language" / "tiny.parquet"
        out.parent.mkdir()
        pq.write_table(pa.Table.from_pandas(frame, schema=SCHEMA, preserve_index=False), out)
        sums = np.array([r[4] for r in rows if r[3] == "word_perplexity"]).sum(0)
        totals = {
            "acc": np.mean([r[4][0] for r in rows if r[3] == "acc"]),
            "acc_stderr,none": 0.1,
            "word_perplexity": float(np.exp(-sums[0] / sums[1])),
        }
        about = json.loads(manifest.read_text())
        about["language"] = {
            "tasks/tiny.yaml": {"file": "language/tiny.parquet", "texts": 80, "results": {"tiny": totals}}
        }
        manifest.write_text(json.dumps(about))
    return folder


def test_models_that_lost_language_are_marked(folder):
    table = language_table(read_results(folder))
    assert table.columns == ["tiny acc", "tiny word perplexity"]
    cells = {tuple(line.heads): line.cells for line in table.lines}
    assert cells["Teacher", "bf16"][0].value is None
    for recipe in ("RTN", "GRACE"):
        assert [cell.mark for cell in cells[recipe, "int2"]] == ["significant"] * 2
        assert [cell.mark for cell in cells[recipe, "int4"]] == ["", ""]
    base, low = cells["Baseline", "bf16"][1], cells["GRACE", "int2"][1]
    assert low.value > base.value > 1 and low.stderr > 0
    assert "lower is better" in markdown(table)


def test_a_total_that_its_texts_do_not_make_is_named(folder):
    manifest = folder / Row("kd", "int4").folder(0) / "predictions/manifest.json"
    about = json.loads(manifest.read_text())
    about["language"]["tasks/tiny.yaml"]["results"]["tiny"]["acc"] = 0.123
    manifest.write_text(json.dumps(about))
    with pytest.raises(GraceError, match=r"kd/int4/seed0/.*tiny\.parquet: acc of its texts is .* lm-eval said 12\.3"):
        language_table(read_results(folder))


def test_without_tasks_it_says_how_to_name_some(results_folder):
    assert "name some under `evaluation.language`" in markdown(language_table(read_results(results_folder)))
