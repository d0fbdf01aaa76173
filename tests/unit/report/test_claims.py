"""Claims and pairs: each is answered as the simulated results have it, with what it could have found."""

import numpy as np
import pytest
from fake_results import make_results

from grace.report.claims import claims_of, findings, measured, savings
from grace.report.comparisons import Family
from grace.report.page.summary import main_finding, verdicts
from grace.report.tables.claims import claims_table
from grace.report.tables.pairs import pairs, pairs_table
from grace.report.tables.table import markdown
from grace.report.tables.write import build_tables
from grace.results.read import Row, read_results


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


def test_numbers_do_not_depend_on_what_was_read_first(results_folder):
    fresh, used = read_results(results_folder), read_results(results_folder)
    for benchmark in reversed(used.benchmarks):
        used.scores(Row("grace", "int4"), benchmark)
    build_tables(used)
    assert findings(fresh) == findings(used)
