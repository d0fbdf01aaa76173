"""The registry is complete, agrees with itself, and is in step with the demo's generator."""

import subprocess
import sys

import pytest

from grace.benchmarks.extraction import EXTRACTIONS
from grace.benchmarks.metrics import METRICS
from grace.benchmarks.protocols import PROTOCOLS, SOURCES, chosen, protocols_of, unknown
from grace.benchmarks.registry import ADDED, BENCHMARKS, DEMO, HARNESS_VERSIONS, PAPER, SERVED, benchmark, task_id
from grace.benchmarks.scores import SCORES
from grace.errors import GraceError

PAPERS = [
    "VQAv2", "GQA", "TextVQA", "VizWiz", "POPE", "ScienceQA-IMG", "MME", "MMBench", "MMStar", "MMMU", "HallusionBench",
    "AI2D", "OCRBench", "SEED-Bench",
]  # fmt: skip


def test_every_benchmark_of_the_paper_is_there_and_in_its_order():
    assert [entry.title for entry in PAPER] == PAPERS
    assert len(BENCHMARKS) == len(PAPER) + len(SERVED) + len(ADDED) + len(DEMO)


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
    assert set(entry.tasks) <= set(HARNESS_VERSIONS)
    assert entry.size > 0 and entry.licence and entry.split
    assert set(entry.unverified) <= set(entry.__dataclass_fields__)
    if entry in DEMO:
        assert entry.mirrors in {paper.name for paper in PAPER}
        assert entry.metric in METRICS and entry.extraction in EXTRACTIONS
        assert entry.prompt.count("<image>") == 1
    else:
        assert set(entry.paper.values()) <= set(protocols_of(entry.name))
        if entry in (*PAPER, *ADDED):
            assert set(entry.revision) == set(entry.tasks)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_says_how_and_from_where(protocol):
    assert SOURCES[protocol]
    for name, how in PROTOCOLS[protocol].items():
        assert name in BENCHMARKS
        assert how.extraction in EXTRACTIONS and how.score in SCORES and how.metric in METRICS, name
        assert {"prompt", "image", "rows", "settings", "extraction", "metric"} <= set(how.source), name
        assert all(how.source.values()) and how.new_tokens > 0 and how.size > 0
        assert set(how.unverified) <= set(how.__dataclass_fields__)
        assert how.placing in ("first", "named", "mentioned", "inline") and how.image in ("processor", "pad")


def test_a_protocol_is_chosen_for_all_or_by_benchmark():
    assert chosen(None, "lm-eval", "colour") == ["demo"]
    assert chosen(None, "vlmeval", "mme") == ["vlmevalkit"]
    assert chosen("grace-release", "grace", "mmstar") == ["grace-release"]
    assert chosen({"mme": ["llava-1.5", "lmms-eval"]}, "grace", "mme") == ["llava-1.5", "lmms-eval"]
    assert chosen({"mme": "llava-1.5"}, "grace", "gqa") == ["lmms-eval"]
    with pytest.raises(GraceError, match=r"`grace-release` does not ask `gqa`; use lmms-eval, vlmevalkit, llava-1\.5"):
        chosen("grace-release", "grace", "gqa")
    with pytest.raises(GraceError, match=r"`llava-1\.5` is not what lmms-eval asks `mme` under; use harness `grace`"):
        chosen("llava-1.5", "lmms-eval", "mme")
    assert unknown({"mme": ["llava"], "color": "lmms-eval"}) == ["color", "llava"]


def test_an_unknown_name_or_harness_is_answered_with_those_there_are():
    with pytest.raises(GraceError, match=r"`color` is not in the registry; it has vqav2, .*colour"):
        benchmark("color")
    with pytest.raises(GraceError, match="vlmeval has no task for `vqav2`; use grace or lmms-eval"):
        task_id("vqav2", "vlmeval")


def test_the_registry_imports_nothing_heavy():
    code = "import sys, grace.benchmarks.protocols; print(*{'torch', 'transformers', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"\n"
