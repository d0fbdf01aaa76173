"""Reading an experiment, and the tables, claims and metrics made of it."""

import csv
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import recompute_table
from fake_results import LEVELS, MIRRORS, experiment, make_results, results_folder
from safetensors.numpy import save_file

from grace.benchmarks.metrics import mme
from grace.config.load import load_experiment
from grace.config.schema import Recipe
from grace.errors import GraceError
from grace.files import write_manifest
from grace.report.claims import claims_of, findings, measured, savings
from grace.report.comparisons import Family
from grace.report.metrics import metrics, write_metrics
from grace.report.page.summary import main_finding, verdicts
from grace.report.paper import (
    AVERAGE,
    canonical,
    label,
    paper_beside,
    paper_numbers,
    role,
    roles,
    seed_range,
    what_was_run,
)  # fmt: skip
from grace.report.speed import speed_metrics, write_speed
from grace.report.tables.benchmark_metrics import jackknife
from grace.report.tables.claims import claims_table
from grace.report.tables.deployment import deployment_table
from grace.report.tables.overlap import overlap_table
from grace.report.tables.pairs import pairs, pairs_table
from grace.report.tables.protocols import protocols_table
from grace.report.tables.scores import Group, groups_of, on_shared_seeds, score_table
from grace.report.tables.table import Cell, Line, Table, aligned, comma_separated, latex, markdown
from grace.report.tables.write import NAMES, build_tables, write_tables
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


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Five seeds, as claims about the method ask for."""
    return read_results(make_results(tmp_path_factory.mktemp("five") / "fake", seeds=(0, 1, 2, 3, 4), questions=80))


@pytest.fixture(scope="module")
def tables(results):
    return {table.name: table for table in build_tables(results)}


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


def test_table_cells_are_recomputable_from_predictions(tables, results_folder):
    line = next(line for line in tables["table1"].lines if line.heads[0] == "GRACE")
    of_seeds = [results_folder / f"students/grace/bf16/seed{seed}/predictions" for seed in (0, 1)]
    means = [
        np.mean([pd.read_parquet(folder / f"{name}.parquet")["score"].mean() for folder in of_seeds])
        for name in MIRRORS
    ]
    assert [cell.value for cell in line.cells[:3]] == pytest.approx([100 * mean for mean in means])
    assert line.cells[3].value == pytest.approx(100 * np.mean(means))
    assert all(cell.stderr > 0 for cell in line.cells[:4])


def test_the_papers_numbers_stand_beside_its_own_models_alone(tables):
    for name, table in tables.items():
        if name != "claims":  # models that were made here: the paper is quoted for its claims
            assert not any(cell.paper for line in table.lines for cell in line.cells), name
    llava, qwen = (load_experiment(f"workflow/experiments/{name}.yaml") for name in ("llava15_7b", "qwen2vl_2b"))
    assert paper_beside(llava, "2", "rtn", "int4", "GQA") == 61.2
    assert paper_beside(llava, "2", "baseline", "bf16", "GQA") == 62.0  # of its Table 1
    assert paper_beside(llava, "3", "teacher", "bf16", "ScienceQA") is None  # that table is Qwen2-VL's
    assert paper_beside(qwen, "3", "teacher", "bf16", "ScienceQA") == 83.3
    assert paper_beside(qwen, "3", "teacher", "bf16", "GQA") is None
    assert paper_beside(qwen, "1", "teacher", "bf16", "GQA") is None
    assert paper_beside(qwen, "3", "gdkd+ib", "bf16", "MMBench") == 76.8
    assert paper_beside(qwen, "4", "kd", "int8", "ScienceQA") == 76.3
    assert paper_beside(llava, "2", "grace", "int8", "MME") is None


@pytest.mark.parametrize(
    ("name", "changes", "shown"),
    [
        ("llava15_7b", {}, "teacher rtn finetune grace"),
        ("llava15_7b", {"teacher": {"pretrained": "/models/teacher"}}, ""),
        ("llava15_7b", {"student": {"pretrained": "/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/0a1b"}},
            "teacher rtn finetune grace"),
        ("llava15_7b", {"student": {"pretrained": "llava-hf/bakLlava-v1-hf"}}, ""),
        ("llava15_7b", {"evaluation": {"limit": 100}}, ""),
        ("llava15_7b", {"evaluation": {"max_new_tokens": 4}}, ""),
        ("llava15_7b", {"data": {"sources": [{"path": "data/mine.json"}]}}, "teacher rtn"),
        ("llava15_7b", {"finetune": {"epochs": 1}}, "teacher rtn"),
        ("llava15_7b", {"finetune": {"epochs": None, "steps": 100}}, "teacher rtn"),
        ("llava15_7b", {"method": {"tau": 1.0}}, "teacher rtn finetune"),
        ("llava15_7b", {"method": {"omega_warmup": 0.2}}, "teacher rtn finetune grace"),
        ("llava15_7b", {"recipes": {"grace": {"kd": "gated", "rcka": True, "controller": True,
            "method": {"omega": 1.0}}}}, "teacher rtn finetune"),
        ("llava15_7b", {"quantization": {"group_size": 64}}, "teacher"),
        ("llava15_7b", {"quantization": {"scale_lr_factor": 20}}, "teacher rtn"),
        ("qwen3vl_2b", {}, "teacher grace"),
        ("qwen3vl_2b", {"finetune": {"epochs": 3}}, "teacher"),
    ],
)  # fmt: skip
def test_the_papers_numbers_need_its_models_questions_and_training(name, changes, shown):
    def merged(below, above):
        both = below.keys() & above.keys()
        deep = {
            key: merged(below[key], above[key])
            for key in both
            if isinstance(above[key], dict) and isinstance(below[key], dict)
        }
        return {**below, **above, **deep}

    shipped = load_experiment(f"workflow/experiments/{name}.yaml").model_dump(mode="json")
    experiment = load_experiment(merged(shipped, changes))
    cells = {
        "teacher": ("1", "teacher", "bf16"), "rtn": ("2", "rtn", "int4"), "finetune": ("2", "none", "int4"),
        "grace": ("2", "grace", "int4"),
    }  # fmt: skip
    benchmark = "SEED-Bench" if name == "qwen3vl_2b" else "VQAv2"
    found = [which for which, (*cell,) in cells.items() if paper_beside(experiment, *cell, benchmark) is not None]
    assert found == shown.split()


def test_rows_of_each_table(tables):
    names = {name: [line.heads for line in table.lines] for name, table in tables.items()}
    assert [head for head, _ in names["table1"]] == [
        "Teacher", "Baseline", "Fine-tuning", "Fine-tuning + KD", "GRACE",
    ]  # fmt: skip
    assert names["table2"][0] == ["Baseline", "bf16"]
    assert names["table2"][1:5] == [["RTN", "int4"], ["AWQ", "int4"], ["QAT", "int4"], ["GRACE", "int4"]]
    assert [h for h, _ in names["table3"]][2:7] == ["Fine-tuning", "GDKD", "RCKA", "IB", "GRACE"]
    assert names["table4"][:3] == [["QAT", "int4"], ["QAT + KD", "int4"], ["GRACE", "int4"]]
    assert {line.group for line in tables["outliers"].lines} == {"INT4 under the outlier transform"}
    assert all(line.run.startswith("demo models, not LLaVA-1.5") for t in tables.values() for line in t.lines[:1])


def test_bold_and_underline_only_where_the_next_is_beaten_after_holm(results):
    known: dict = {}
    score_table(results, "table2", "", "2", groups_of(results)["2"], known)
    for group in groups_of(results)["2"][1:]:
        order = sorted(group.rows, key=lambda row: -np.mean(results.scores(row, "colour").values))
        assert (order[0], order[1], "colour", (0, 1)) in known
    tests = Family(results, known)
    a, b = Row("grace", "int4"), Row("qat", "int4")
    for column in (AVERAGE, "colour"):
        tests.show(a, b, column)
    p = [known[a, b, column, (0, 1)].p for column in (AVERAGE, "colour")]
    assert sorted(tests.adjusted().values()) == pytest.approx(sorted([min(1, 2 * min(p)), max(max(p), 2 * min(p))]))


def test_equal_models_are_not_marked(tmp_path, results_folder):
    folder = tmp_path / "equal"
    shutil.copytree(results_folder, folder)
    for seed in (0, 1):
        shutil.rmtree(folder / f"students/grace/int4/seed{seed}")
        shutil.copytree(folder / f"students/qat/int4/seed{seed}", folder / f"students/grace/int4/seed{seed}")
    equal = read_results(folder)
    table = score_table(equal, "table4", "", "4", groups_of(equal)["4"], {})
    cells = {line.heads[0]: line.cells for line in table.lines if line.heads[1] == "int4"}
    assert [cell.value for cell in cells["GRACE"][:3]] == [cell.value for cell in cells["QAT"][:3]]
    assert cells["GRACE"][-2].value == 0 and cells["GRACE"][-2].mark == ""


def test_written_forms_agree(tmp_path, results):
    write_tables(results, tmp_path / "tables")
    written = {path.name for path in (tmp_path / "tables").iterdir()}
    assert written == {f"{name}.{end}" for name in NAMES for end in ("md", "csv", "tex")} | {
        "cells.jsonl",
        "manifest.json",
        "environment.json",
    }
    with open(tmp_path / "tables" / "table1.csv") as file:
        rows = {row["Model"]: row for row in csv.DictReader(file)}
    assert float(rows["Baseline"]["average"]) == pytest.approx(65, abs=10)
    assert float(rows["Baseline"]["average stderr"]) > 0
    assert rows["GRACE"]["colour (GQA) paper"] == ""
    for name in NAMES:
        _check_latex((tmp_path / "tables" / f"{name}.tex").read_text())
    assert "demo models, not LLaVA-1.5" in (tmp_path / "tables" / "table1.md").read_text()
    assert "Holm" in (tmp_path / "tables" / "table1.md").read_text()


def _check_latex(text: str) -> None:
    """Braces and environments close, every row has the columns that the tabular declares, no bare special character."""
    assert text.count("{") == text.count("}")
    assert re.findall(r"\\begin{(\w+\*?)}", text) == re.findall(r"\\end{(\w+\*?)}", text)[::-1]
    if r"\begin{tabular}" not in text:  # an empty table: its notes say why
        assert any(f"tab:{name}" in text for name in ("language", "protocols", "overlap"))
        return
    declared = re.search(r"\\begin{tabular}{(.+)}\n", text)
    columns = len(re.sub(r"p{\d+cm}", "p", declared[1]))
    rows = [line for line in text.splitlines() if line.endswith(r" \\") and "multicolumn" not in line]
    assert len(rows) > 2 and all(len(re.findall(r"(?<!\\)&", row)) == columns - 1 for row in rows), columns
    assert not re.search(r"(?<!\\)[_%#]", re.sub(r"{!}{%|\\label{.*}", "", text))
    assert text.isascii() or not re.search("[±−×“”Δ²]", text)


def test_marks_in_each_written_form():
    cells = [
        Cell(71.04, 0.5, 61.2, "best"),
        Cell(70.0, 0.5, mark="second"),
        Cell(-1.25, 0.2, mark="significant", signed=True),
    ]
    table = Table("t", "T", ["Model"], ["a_1", "b", "Δ"], [Line(["x & y"], cells, "", "demo")], ["Note < 5%."])
    assert "| x & y | **71.0** ± 0.5<br>paper 61.2 | <u>70.0</u> ± 0.5 | −1.2 ± 0.2* | demo |" in markdown(table)
    text = latex(table)
    assert r"x \& y & \textbf{71.0} $\pm$ 0.5 & \underline{70.0} $\pm$ 0.5 & $-$1.2 $\pm$ 0.2* & demo" in text
    assert r"\quad paper & \emph{61.2}\phantom{ $\pm$ 0.5} &  &" in text and r"a\_1" in text
    assert (
        comma_separated(table)
        .splitlines()[1]
        .startswith(",x & y,71.04,0.5,61.2,best,70,0.5,,second,-1.25,0.2,,significant")
    )


def test_a_label_is_shown_as_it_is_in_each_written_form():
    label_ = "[5pt] $x$ <script>a|b* _c_ `d`"
    table = Table("t", "T", ["Model"], ["a"], [Line([label_], [Cell(1.0)], label_, label_)], [label_])
    text = markdown(table)
    assert "<script" not in text and text.count(r"\[5pt] \$x\$ &lt;script>a\|b\* \_c\_ \`d\`") == 3
    tex = latex(table)
    assert not re.search(r"^\s*[\[*]", tex, re.MULTILINE) and r"{[}5pt] \$x\$ $<$script$>$a|b{*} \_c\_" in tex
    assert next(csv.reader(comma_separated(table).splitlines()[1:]))[1] == label_


def test_numbers_of_a_column_stand_under_each_other():
    cells = [Cell(5.0, 1.5, mark="significant"), Cell(15.0, 10.5), Cell(7.0), Cell(text="reference")]
    table = Table("t", "T", ["Model"], ["a"], [Line(["x"], [cell]) for cell in cells])
    texts = [line[0] for line in aligned(table)]
    assert [(text.before_error, text.after) for text in texts] == [("0", ""), ("", "*"), ("", " ± 10.5*"), ("", "")]


def test_claims_state_what_the_simulation_holds(five):
    found = {item.claim.text: item for item in findings(five)}
    teacher = found["The teacher is above the bf16 student"]
    assert teacher.comparison.difference > 15 and teacher.decision.verdict == "Holds"
    assert teacher.paper == pytest.approx(69.1 - 66.5)
    assert found["Rounding hurts at INT2"].decision.verdict == "Holds"
    assert found["Rounding hurts at INT2"].comparison.difference < -15
    assert found["GRACE is above QAT at INT4"].decision.verdict == "Holds"
    assert found["GRACE is above QAT at INT4"].paper == pytest.approx(67.2 - 65.9)
    assert all(item.p >= item.comparison.p - 1e-12 and item.p_questions <= 1 for item in found.values())
    assert all(item.p >= item.p_questions for item in found.values() if item.comparison.seeds > 1)
    page = markdown(claims_table(five))
    groups = {item.claim.group for item in found.values()}
    assert page.count("\n| ") == len(found) + len(measured(five)) + 2 + len(groups) + 1
    assert "Whatever they show stands here" in page
    assert found["GRACE is above QAT + KD at INT4"].paper == pytest.approx(
        np.mean([76.9 - 73, 75.6 - 72.1, 79.1 - 75.2])
    )


def test_each_claim_is_answered_with_yes_no_or_not_decided(five, results):
    shown = [line for part in verdicts(five, {}) for line in part["claims"]]
    assert {text for text, *_ in shown} == {c.text for c in claims_of(five)} | {
        m.text for m in (*measured(five), *savings(five))
    }
    assert {verdict for _, _, _, verdict, _ in shown} <= {"Holds", "Fails", "Not decided"}
    assert verdicts(five, {})[0]["group"] == "GRACE"
    two = {item.claim.text: item.decision for item in findings(results)}  # two seeds, whatever they show
    assert {decision.verdict for decision in two.values()} == {"Not decided"}
    assert "it takes 5 seeds, there are 2" in two["GRACE is above QAT at INT4"].reason
    assert "it takes 3 seeds" in two["Rounding hurts at INT2"].reason


def test_a_significant_loss_is_said_as_plainly_as_a_win(tmp_path):
    folder = make_results(tmp_path / "lost", seeds=(0, 1, 2, 3, 4), questions=60, change={("grace", "int2"): 0.15})
    lost = read_results(folder)
    decision = {item.claim.text: item.decision for item in findings(lost)}["GRACE is above QAT at INT2"]
    assert decision.verdict == "Fails" and "the reverse holds" in decision.reason
    pair = next(p for p in pairs(lost, {}) if p.claim.text == "GRACE is above QAT at INT2")
    assert "colour (GQA) (−" in pair.said(lost, -1, pair.these) and not pair.said(lost, 1, pair.these)
    notes = " ".join(pairs_table(lost, {}).notes)
    assert "Significantly worse: GRACE int2 below QAT int2 on" in notes and "Significantly better: GRACE" in notes


def test_a_pair_says_what_it_could_have_found(results, tables):
    lines = [line for line in tables["pairs"].lines if line.heads[0] == "GRACE int4 − QAT int4"]
    assert [line.heads[1] for line in lines] == ["difference", "detectable"] and lines[0].run.endswith("; seeds 0-1")
    known: dict = {}
    found = Family(results, known).compare(Row("grace", "int4"), Row("qat", "int4"), "colour")
    assert lines[0].cells[0].value == found.difference
    assert lines[1].cells[0].value == found.detectable() > found.stderr * 2.8


def test_the_main_finding_says_difference_and_verdict(five):
    said = main_finding(five)
    item = next(item for item in findings(five) if item.claim.text == "GRACE is above QAT at INT4")
    assert f"GRACE int4 is {item.comparison.difference:.1f} points above QAT int4" in said and said.endswith(
        "it holds."
    )


def test_deployment_ratios(results):
    table = deployment_table(results)
    line = next(line for line in table.lines if line.heads == ["GRACE", "int4"] and line.cells[0].value == 8)
    assert line.cells[4].value == pytest.approx(620 / 500)
    assert line.cells[5].value == pytest.approx(0.5)
    assert any(line.heads[0] == "kernel cpu-int4" for line in table.lines)


def test_numbers_do_not_depend_on_what_was_read_first(results_folder):
    fresh, used = read_results(results_folder), read_results(results_folder)
    for benchmark in reversed(used.benchmarks):
        used.scores(Row("grace", "int4"), benchmark)
    build_tables(used)
    assert findings(fresh) == findings(used)


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


def test_decoding_tables_of_before_there_was_a_choice_of_cache(results_folder, tmp_path):
    folder = shutil.copytree(results_folder, tmp_path / results_folder.name)
    table = pd.read_csv(folder / "bench" / "decode.csv")
    table[table.cache == 16].drop(columns="cache").to_csv(folder / "bench" / "decode.csv", index=False)
    assert (read_results(folder).decode.cache == 16).all()


def test_roles():
    config = experiment()
    run = {name for runs in config.runs for name in runs.recipes}
    named = {name: role(recipe) for name, recipe in config.recipes.items() if name in run}
    assert named == {
        "rtn": "rtn", "awq": "awq", "qat": "none", "kd": "kd", "gdkd": "gdkd", "rcka": "rcka", "ib": "ib",
        "grace": "grace",
    }  # fmt: skip
    assert role(Recipe(kd="gated", controller=True)) == "gdkd+ib"
    assert role(Recipe(kd="plain", rcka=True, controller=True)) == "rcka+ib"
    assert role(Recipe(kd="plain", rcka=True)) == "kd+rcka"
    later = {"rtn-later": Recipe(post_training="rtn", start="qat/bf16"), **config.recipes}
    runs = [config.runs[0].model_copy(update={"recipes": ["rtn-later", "rtn"]})]
    found = roles(config.model_copy(update={"recipes": later, "runs": runs}))
    assert (found["rtn"], found["rtn-later"]) == ("rtn", "variant")  # the paper rounds the baseline


def test_names_for_people():
    config = experiment()
    assert label(config, Row("qat", "bf16")) == "Fine-tuning" and label(config, Row("qat", "int4")) == "QAT"
    assert seed_range((0, 1, 2)) == "seeds 0-2" and seed_range((3,)) == "seed 3" and seed_range((0, 2)) == "seeds 0, 2"
    assert what_was_run(config, (0,)) == "demo models, not LLaVA-1.5, on demo images; seed 0"
    assert (
        canonical("scienceqa-img") == "ScienceQA" and canonical("SQA") == "ScienceQA" and canonical("mmb") == "MMBench"
    )
    assert canonical("seed-bench") == "SEED-Bench" and canonical("colour") == "colour"


def test_paper_numbers_are_whole():
    numbers = paper_numbers()
    assert len(numbers) == 162 and not numbers.duplicated(["source", "table", "row", "precision", "benchmark"]).any()


def _broken(path, change):
    frame = pd.read_parquet(path)
    change(frame).to_parquet(path)


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
    _broken(path, change)
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
    _broken(folder / "students/kd/int4/seed0/predictions/colour.parquet", lambda f: f.head(50))
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


def test_partial_results_make_tables_with_gaps(tmp_path, results_folder):
    folder = tmp_path / "part"
    shutil.copytree(results_folder, folder)
    shutil.rmtree(folder / "teacher")
    shutil.rmtree(folder / "students/rtn/int4")
    (folder / "students/grace/int4/seed1/predictions/colour.parquet").unlink()
    with pytest.raises(GraceError, match="no such file"):
        read_results(folder)
    part = read_results(folder, partial=True)
    assert part.missing == ["teacher", "rtn int4 seed 0", "rtn int4 seed 1", "grace int4 on colour"]
    tables = {table.name: table for table in build_tables(part)}
    assert [line.heads[0] for line in tables["table1"].lines[:2]] == ["Baseline", "Fine-tuning"]
    grace = next(line for line in tables["table2"].lines if line.heads == ["GRACE", "int4"])
    values = dict(zip(tables["table2"].columns, [cell.value for cell in grace.cells], strict=True))
    assert values["colour (GQA)"] is None and values["average"] is None and values["presence (POPE)"] > 0
    assert "Partial results: 4 sets of predictions are not here (teacher, rtn int4" in markdown(tables["table2"])
    assert not any("INT4" in line.heads[0] and "GRACE" in line.heads[0] for line in tables["claims"].lines)
    assert "average" not in metrics(part)["scores"]["grace"]["int4"]


def test_one_seed_and_no_students_make_tables_too(tmp_path):
    folder = make_results(tmp_path / "one", seeds=(0,), questions=20)
    tables = {table.name: table for table in build_tables(read_results(folder))}
    compared = [line for line in tables["claims"].lines if line.group != "Measured values"]
    assert {line.cells[3].text for line in compared} == {"–"}
    assert {line.heads[1] for line in compared} == {"Not decided"}
    assert all("seeds, there is one" in line.heads[3] for line in compared)
    shutil.rmtree(folder / "students" / "grace")
    for name in ("qat", "kd", "gdkd", "rcka", "ib", "rtn", "awq"):
        shutil.rmtree(folder / "students" / name)
    tables = {table.name: table for table in build_tables(read_results(folder, partial=True))}
    assert [line.heads[0] for line in tables["table1"].lines] == ["Teacher", "Baseline"]
    assert not tables["table2"].lines and "ran nothing" in markdown(tables["table2"])


def test_a_block_never_mixes_seeds(tmp_path, results_folder):
    """RTN has but one, good seed, so that its mean is the highest; on that seed QAT is better, significantly."""
    folder = tmp_path / "lucky"
    shutil.copytree(results_folder, folder)
    shutil.rmtree(folder / "students/rtn/int4/seed1")
    for recipe, seed, right in (("rtn", 0, 60), ("qat", 0, 79), ("qat", 1, 4)):
        for name in MIRRORS:
            path = folder / f"students/{recipe}/int4/seed{seed}/predictions/{name}.parquet"
            _broken(path, lambda f, right=right: f.assign(score=(np.arange(len(f)) < right) * 1.0))
    lucky = read_results(folder, partial=True)
    rows = [Row("rtn", "int4"), Row("qat", "int4")]
    (group,) = on_shared_seeds(lucky, [Group("", rows)])
    assert (group.seeds, group.apart) == ((0,), ())
    table = score_table(lucky, "t", "", "2", [group], {})
    assert [line.cells[0].value for line in table.lines] == [75.0, 98.75]
    assert table.lines[1].cells[0].mark == "best" and "seed 0 (also run: seed 1)" in table.lines[1].run
    more = [*rows, Row("kd", "int4"), Row("grace", "int4")]
    (group,) = on_shared_seeds(lucky, [Group("", more, more[1])])
    assert (group.seeds, group.apart) == ((0, 1), (rows[0],))  # 2 x 2 comparisons, not 3 x 1
    table = score_table(lucky, "t", "", "2", [group], {})
    assert table.lines[0].cells[0].mark == "" and table.lines[0].cells[-2].text == "–"
    assert "NOT COMPARED: lacks seed 1" in table.lines[0].run and "neither ranked nor compared" in markdown(table)
    (group,) = on_shared_seeds(lucky, [Group("", more, more[0])])
    assert group.seeds == (0,) and not group.apart  # the reference has no other


def test_every_table_is_what_a_script_without_our_code_computes(tmp_path, results_folder):
    folder = tmp_path / "again"
    shutil.copytree(results_folder, folder)
    write_tables(read_results(folder), folder / "tables")
    write_speed(read_results(folder), folder / "speed")
    found = recompute_table.deviations(folder)
    assert all(each.count > 3 and each.largest < 1e-3 for each in found.values()), vars(found["pairs"])
    for name, old, new in (
        ("table1", "Baseline,bf16,6", "Baseline,bf16,5"), ("pairs", ",detectable,1", ",detectable,3"),
    ):  # fmt: skip
        text = (folder / f"tables/{name}.csv").read_text()
        assert old in text, name
        (folder / f"tables/{name}.csv").write_text(text.replace(old, new))
        assert recompute_table.deviations(folder)[name].largest > 1


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
