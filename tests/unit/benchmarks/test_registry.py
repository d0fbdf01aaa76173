"""The registry is complete, agrees with itself, and is in step with the demo's generator."""

import subprocess
import sys

import pytest

from grace.benchmarks.extraction import EXTRACTIONS
from grace.benchmarks.metrics import METRICS
from grace.benchmarks.registry import BENCHMARKS, DEMO, HARNESS_VERSIONS, PAPER, benchmark, task_id
from grace.errors import GraceError

PAPERS = [
    "VQAv2", "GQA", "TextVQA", "VizWiz", "POPE", "ScienceQA-IMG", "MME", "MMBench", "MMStar", "MMMU", "HallusionBench",
    "AI2D", "OCRBench", "SEED-Bench",
]  # fmt: skip


def test_every_benchmark_of_the_paper_is_there_and_in_its_order():
    assert [entry.title for entry in PAPER] == PAPERS
    assert len(BENCHMARKS) == len(PAPER) + len(DEMO)


def test_the_demo_is_in_step_with_its_generator():
    from grace.demo.benchmarks import BENCHMARKS as GENERATED

    assert {entry.name for entry in DEMO} == set(GENERATED)
    for entry in DEMO:
        assert GENERATED[entry.name].mirrors.split(",")[0].lower() in (
            entry.mirrors,
            entry.mirrors.removesuffix("-img"),
        )


@pytest.mark.parametrize("entry", BENCHMARKS.values(), ids=lambda entry: entry.name)
def test_every_entry_is_whole(entry):
    assert entry.backend in entry.tasks
    assert set(entry.tasks) <= set(HARNESS_VERSIONS)
    assert entry.metric in METRICS and entry.extraction in EXTRACTIONS
    assert entry.prompt.count("<image>") == 1
    assert entry.size > 0 and entry.licence and entry.split
    assert set(entry.unverified) <= set(entry.__dataclass_fields__)
    if entry in DEMO:
        assert entry.mirrors in {paper.name for paper in PAPER}
    else:
        assert set(entry.revision) <= set(entry.tasks)


def test_an_unknown_name_or_harness_is_answered_with_those_there_are():
    with pytest.raises(GraceError, match=r"`color` is not in the registry; it has vqav2, .*colour"):
        benchmark("color")
    with pytest.raises(GraceError, match="vlmeval has no task for `vqav2`; use lmms-eval"):
        task_id("vqav2", "vlmeval")


def test_the_registry_imports_nothing_heavy():
    code = "import sys, grace.benchmarks.registry; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
