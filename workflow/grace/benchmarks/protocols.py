"""Protocols: how each benchmark is asked, read and scored by those whose numbers one wants to compare with.

A number is that of a model under a protocol. What a protocol fixes stands here as data, each field with its source:
prompt and placing of images, image handling, rows, settings, extraction, score and metric. Two protocols that show a
model the same prompt and images share its answers.

Prompts are Jinja templates over `question`, `hint`, `options` (pairs of letter and text) and `words` (OCR tokens).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grace.benchmarks.registry import BENCHMARKS, Benchmark, benchmark
from grace.errors import GraceError

DEMO, LMMS, KIT, LLAVA, RELEASE = "demo", "lmms-eval", "vlmevalkit", "llava-1.5", "grace-release"
SOURCES = {
    DEMO: "this project",
    LMMS: "lmms-eval 0.7.3, lmms_eval/tasks",
    KIT: "open-compass/VLMEvalKit at e8e78f05f3080fe28154f2130321f17951c3be94, vlmeval",
    LLAVA: "haotian-liu/LLaVA at c121f04, llava/eval and scripts/v1_5/eval",
    RELEASE: "ForeverBlue816/GRACE at b73fa9b, evaluation",
}
"""By protocol: where its fields were read. Paths in `Spec.source` are below these."""


@dataclass(frozen=True)
class Spec:
    """How one benchmark is asked and scored under one protocol.

    Attributes:
        prompt: Jinja template.
        new_tokens: longest answer in tokens.
        extraction: a key of `grace.benchmarks.extraction.EXTRACTIONS`.
        score: a key of `grace.benchmarks.scores.SCORES`.
        metric: a key of `grace.benchmarks.metrics.METRICS`.
        size: rows that are asked.
        source: file of each field, below `SOURCES`; `judge` says what stands in for an LLM judge.
        rows: which rows of the file: all, image (SEED-Bench's), with_image, validation (MMMU's).
        placing: which images, where: see `grace.benchmarks.items.show`.
        image: processor (as the model's processor takes it) or pad (first to a square of the processor's mean colour).
        stop: the answer ends before any of these.
        new_tokens_open: the same as `new_tokens` for questions without options, where it differs.
        group: columns that make a row's `group`.
        hidden: answers are on a server, so a submission is written and nothing is scored.
        unverified: fields whose value is hearsay.
    """

    prompt: str
    new_tokens: int
    extraction: str
    score: str
    metric: str
    size: int
    source: Mapping[str, str]
    rows: str = "all"
    placing: str = "first"
    image: str = "processor"
    stop: tuple[str, ...] = ()
    new_tokens_open: int | None = None
    group: tuple[str, ...] = ("category",)
    hidden: bool = False
    unverified: tuple[str, ...] = ()

    @property
    def lists_options(self) -> bool | None:
        """Whether the prompt lists a question's options; None: where it has some."""
        return None if "{% if options %}" in self.prompt else "in options" in self.prompt


_SHORT = "\nAnswer the question using a single word or phrase."
_DIRECT = "\nAnswer with the option's letter from the given choices directly."
_LETTERS = "{% for letter, option in options %}{{letter}}. {{option}}\n{% endfor %}"
_BELOW = "{% for letter, option in options %}\n{{letter}}. {{option}}{% endfor %}"


def _from(file: str, **more: str) -> dict[str, str]:
    """The same file for every field, but for those named."""
    return {**dict.fromkeys(("prompt", "image", "rows", "settings", "extraction", "metric"), file), **more}


_LMMS = {
    "vqav2": Spec(
        "{{question}}" + _SHORT, 16, "vqa_challenge", "vqa_challenge", "vqa_accuracy", 214_354,
        _from("vqav2/{vqav2_val.yaml,utils.py}"),
    ),
    "gqa": Spec(
        "{{question}}" + _SHORT, 16, "whole", "exact_match", "exact_match", 12_578, _from("gqa/{gqa.yaml,utils.py}"),
        unverified=("size",),
    ),
    "textvqa": Spec(
        "{{question | capitalize}}" + _SHORT, 1024, "vqa_evalai", "vqa_evalai", "vqa_accuracy", 5_000,
        _from("textvqa/{_default_template_textvqa_yaml,utils.py}", settings="models/simple/llava.py"),
       
    ),
    "vizwiz": Spec(
        "{{question | capitalize}}\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        + _SHORT,
        1024, "vqa_evalai", "vqa_evalai", "vqa_accuracy", 4_319,
        _from("vizwiz_vqa/{_default_template_vqa_yaml,utils.py}", settings="models/simple/llava.py"),
       
    ),
    "pope": Spec(
        "{{question | trim}}" + _SHORT, 128, "yes_no_lmms", "same", "pope_lmms", 9_000,
        _from("pope/{pope.yaml,utils.py}"),
    ),
    "scienceqa-img": Spec(
        "{% if hint %}Context: {{hint}}\n{% endif %}{{question}}" + _BELOW + _DIRECT, 16, "letter_lmms_scienceqa",
        "same", "exact_match", 2_017, _from("scienceqa/{scienceqa_img.yaml,utils.py}"), rows="with_image",
        unverified=("size",),
    ),
    "mme": Spec(
        "{{question | trim | replace(' Please answer yes or no.', '')}}" + _SHORT, 16, "yes_no_mme", "same", "mme",
        2_374, _from("mme/{mme.yaml,utils.py}"),
    ),
    "mmbench": Spec(
        "{% if hint %}{{hint}} {% endif %}{{question}} There are several options:" + _BELOW + "\n" + _DIRECT, 1024,
        "letter_lmms_mmbench", "same", "circular", 4_329,
        _from("mmbench/{mmbench_en_dev_static.yaml,en_utils.py}", metric="mmbench/mmbench_evals.py"),
        unverified=("size",),
    ),
    "mmstar": Spec(
        "{{question | trim | replace(' Please answer yes or no.', '')}}"
        "\nAnswer with the option's letter from the given choices directly", 1024, "letter_lmms_mmstar", "same",
        "mean_of_groups", 1_500,
        _from("mmstar/{_default_template_yaml,utils.py}", extraction="_task_utils/mcq_extract.py",
              settings="models/simple/llava.py"),
        group=("subcategory",),
    ),
    "mmmu": Spec(
        "{{question}}{% if options %}" + _BELOW + "\n" + _DIRECT + "{% else %}\n" + _SHORT + "{% endif %}", 128,
        "mmmu_lmms", "mmmu_lmms", "exact_match", 900,
        _from("mmmu/{mmmu_val.yaml,utils.py}", extraction="_task_utils/mmmu_mcq_utils.py",
              judge="an answer that cannot be read is wrong (the task guesses at random)"),
        rows="validation", placing="named",
    ),
    "ai2d": Spec(
        "{{question}}" + _BELOW + _DIRECT, 16, "letter_lmms_ai2d", "exact_match", "exact_match", 3_088,
        _from("ai2d/{ai2d.yaml,utils.py}"),
    ),
    "ocrbench": Spec(
        "{{question | trim}}", 128, "whole", "contains_lmms", "contains", 1_000,
        _from("ocrbench/{ocrbench.yaml,utils.py}"),
    ),
    "seed-bench": Spec(
        "{{question}}" + _BELOW + _DIRECT, 1024, "letter_lmms_seed", "trimmed", "exact_match", 14_233,
        _from("seedbench/{seedbench.yaml,utils.py}", rows="the metric seed_image: data_type == image",
              settings="models/simple/llava.py"),
        rows="image", unverified=("size",),
    ),
}  # fmt: skip

_ASKED = "{% if hint %}Hint: {{hint}}\n{% endif %}Question: {{question}}\n"
_OPTIONS = "Options:\n" + _LETTERS + "Please select the correct answer from the options above. \n"
_EXACT = "exact matching: an answer that cannot be read is wrong (otherwise an LLM is asked)"


def _kit_choice(metric: str, size: int, unverified: tuple[str, ...] = (), **more) -> Spec:
    source = _from(
        "dataset/image_mcq.py", extraction="utils/matching_util.py", metric="dataset/utils/multiple_choice.py",
        settings="vlm/base.py leaves them to the model; ours", judge=_EXACT,
    )  # fmt: skip
    settings = {
        "prompt": _ASKED + _OPTIONS, "extraction": "letter_vlmevalkit", "score": "same", "new_tokens": 512, **more,
    }  # fmt: skip
    return Spec(metric=metric, size=size, source=source, unverified=unverified, **settings)


def _kit_yes_no(metric: str, size: int, unverified: tuple[str, ...] = (), **more) -> Spec:
    source = _from(
        "dataset/image_yorn.py", extraction="dataset/utils/yorn.py", metric="dataset/utils/yorn.py",
        settings="vlm/base.py leaves them to the model; ours", judge=_EXACT,
    )  # fmt: skip
    return Spec(
        "{{question}}", 512, "yes_no_vlmevalkit", "same", metric, size, source, unverified=unverified, **more
    )  # fmt: skip


def _kit_vqa(prompt: str, extraction: str, score: str, metric: str, size: int, unverified=()) -> Spec:
    source = _from(
        "dataset/image_vqa.py", extraction="dataset/utils/vqa_eval.py", metric="dataset/utils/vqa_eval.py",
        settings="vlm/base.py leaves them to the model; ours",
    )  # fmt: skip
    return Spec(prompt, 512, extraction, score, metric, size, source, unverified=unverified)


_KIT = {
    "gqa": _kit_vqa("{{question}}" + _SHORT, "whole", "trimmed", "exact_match", 12_578, ("size",)),
    "textvqa": _kit_vqa("{{question}}" + _SHORT, "vqa_vlmevalkit", "vqa_vlmevalkit", "vqa_accuracy", 5_000),
    "vizwiz": _kit_vqa("{{question}}", "vqa_vlmevalkit", "vqa_vlmevalkit", "vqa_accuracy", 4_319),
    "pope": _kit_yes_no("pope", 9_000, ("size",)),
    "mme": _kit_yes_no("mme", 2_374),
    "hallusionbench": _kit_yes_no("hallusion", 951, group=("subcategory",), rows="with_image"),
    "scienceqa-img": _kit_choice("exact_match", 2_017, ("size",)),
    "mmbench": _kit_choice("circular", 4_329, ("size",)),
    "mmbench-test": _kit_choice("circular", 6_666, ("size",), hidden=True),
    "mmstar": _kit_choice("exact_match", 1_500),
    "mmmu": _kit_choice(
        "exact_match", 900, prompt=_ASKED + "{% if options %}" + _OPTIONS + "{% endif %}", extraction="mmmu_vlmevalkit",
        score="mmmu_vlmevalkit", rows="validation", placing="inline",
    ),
    "ai2d": _kit_choice("exact_match", 3_088),
    "ocrbench": _kit_vqa("{{question}}", "whole", "contains_vlmevalkit", "contains", 1_000),
    "seed-bench": _kit_choice("exact_match", 14_232, ("size",), rows="image"),
}  # fmt: skip

_LOADER = "llava/eval/model_vqa_loader.py"
_OCR = "{% if words %}\nReference OCR token: {{words | join(', ')}}{% endif %}"


def _llava(script: str, **more: str) -> dict[str, str]:
    return _from(
        _LOADER, rows=script, metric=script, prompt="docs/Evaluation.md",
        image="llava/mm_utils.py: image_aspect_ratio pad, as llava-v1.5's config says", **more,
    )  # fmt: skip


_LLAVA = {
    "vqav2": Spec(
        "{{question}}" + _SHORT, 128, "vqa_evalai", "vqa_evalai", "vqa_accuracy", 107_394,
        _llava("scripts/v1_5/eval/vqav2.sh", extraction="scripts/convert_vqav2_for_submission.py"), image="pad",
        hidden=True, unverified=("size",),
    ),
    "gqa": Spec(
        "{{question}}" + _SHORT, 128, "without_stop", "trimmed", "exact_match", 12_578,
        _llava("scripts/v1_5/eval/gqa.sh", extraction="scripts/convert_gqa_for_eval.py"), image="pad",
        unverified=("size",),
    ),
    "textvqa": Spec(
        "{{question}}" + _OCR + _SHORT, 128, "vqa_evalai", "vqa_evalai", "vqa_accuracy", 5_000,
        _llava("llava/eval/eval_textvqa.py", extraction="llava/eval/m4c_evaluator.py"), image="pad",
    ),
    "vizwiz": Spec(
        "{{question}}\nWhen the provided information is insufficient, respond with 'Unanswerable'." + _SHORT, 128,
        "vqa_evalai", "vqa_evalai", "vqa_accuracy", 8_000,
        _llava("scripts/v1_5/eval/vizwiz.sh", extraction="scripts/convert_vizwiz_for_submission.py"), image="pad",
        hidden=True, unverified=("size", "prompt"),
    ),
    "pope": Spec(
        "{{question}}" + _SHORT, 128, "yes_no_llava", "same", "pope", 8_910,
        _llava("scripts/v1_5/eval/pope.sh", extraction="llava/eval/eval_pope.py"), image="pad", unverified=("size",),
    ),
    "scienceqa-img": Spec(
        "Context: {{hint or 'N/A'}}\nQuestion: {{question}}\nOptions:{% for letter, option in options %} ({{letter}}) "
        "{{option}}{% endfor %}" + _DIRECT, 1024, "letter_llava_scienceqa", "same", "by_modality", 2_017,
        _llava("llava/eval/eval_science_qa.py", extraction="llava/eval/eval_science_qa.py",
               settings="llava/eval/model_vqa_science.py"),
        rows="with_image", image="pad", unverified=("size", "prompt"),
    ),
    "mme": Spec(
        "{{question | trim | replace(' Please answer yes or no.', '')}}" + _SHORT, 128, "yes_no_mme", "same", "mme",
        2_374, _llava("scripts/v1_5/eval/mme.sh", extraction="MME's eval_tool/calculation.py"), image="pad",
        unverified=("extraction",),
    ),
    "mmbench": Spec(
        "{% if hint %}{{hint}}\n{% endif %}{{question}}" + _BELOW + _DIRECT, 1024, "letter_vlmevalkit", "same",
        "circular", 4_377,
        _llava("scripts/v1_5/eval/mmbench.sh", settings="llava/eval/model_vqa_mmbench.py",
               judge="MMBench's server reads with an LLM; here VLMEvalKit's exact matching, and a submission beside"),
        image="pad", unverified=("size", "extraction"),
    ),
    "seed-bench": Spec(
        "{{question}}" + _BELOW + _DIRECT, 128, "whole", "same", "exact_match", 14_233,
        _llava("scripts/v1_5/eval/seed.sh", extraction="scripts/convert_seed_for_submission.py"), rows="image",
        image="pad", unverified=("size",),
    ),
}  # fmt: skip

_RELEASE_CHOICE = (
    "Question: {{question | trim}}\nOptions:\n{% for letter, option in options %}({{letter}}) {{option}}\n{% endfor %}"
    "Answer with only the option letter."
)
_RELEASE_CONTEXT = "{% if hint | trim %}Context: {{hint | trim}}\n{% endif %}" + _RELEASE_CHOICE
_RELEASE = {
    "ai2d": Spec(
        _RELEASE_CHOICE, 8, "letter_grace_first", "same", "exact_match", 3_088, _from("AI2D/eval_ai2d.py"),
    ),
    "mmbench": Spec(
        _RELEASE_CONTEXT, 8, "letter_grace_first", "same", "exact_match", 4_329, _from("MMBench/eval_mmbench.py"),
        unverified=("size",),
    ),
    "scienceqa-img": Spec(
        _RELEASE_CONTEXT, 8, "letter_grace_first", "same", "by_modality", 4_241,
        _from("ScienceQA/eval_scienceqa.py"), unverified=("size",),
    ),
    "seed-bench": Spec(
        _RELEASE_CHOICE, 8, "letter_grace_first", "same", "exact_match", 14_233,
        _from("SEEDBench/eval_seedbench.py"), rows="image", unverified=("size",),
    ),
    "mmmu": Spec(
        "{% if options %}" + _RELEASE_CHOICE + "{% else %}{{question | trim}}\n"
        "Answer with a short phrase or number only.{% endif %}", 8, "mmmu_grace", "mmmu_grace", "exact_match", 900,
        _from("mmmu/eval_mmmu.py"), rows="validation", placing="mentioned", new_tokens_open=32,
    ),
    "mmstar": Spec(
        "{% if options %}" + _RELEASE_CHOICE + "{% else %}{{question | trim}}\n\nAnswer with only the option letter "
        "(A, B, C, or D).{% endif %}", 64, "letter_grace_last", "same", "exact_match", 1_500,
        _from("MMStar/eval_mmstar.py", settings="MMStar/eval_mmstar.slurm"),
    ),
    "hallusionbench": Spec(
        "{{question | trim}}\nAnswer with only 'Yes' or 'No'.", 8, "yes_no_grace", "same", "hallusion", 1_129,
        _from("HallusionBench/eval_hallusion.py"), group=("category", "subcategory"),
    ),
    "ocrbench": Spec(
        "{{question | trim}}", 128, "whole", "contains_grace", "contains", 1_000, _from("OCRBench/eval_ocrbench.py"),
    ),
}  # fmt: skip

PROTOCOLS: dict[str, dict[str, Spec]] = {LMMS: _LMMS, KIT: _KIT, LLAVA: _LLAVA, RELEASE: _RELEASE}
"""By protocol and benchmark. The demo's benchmarks have one of their own."""


def spec(protocol: str, name: str) -> Spec:
    """How a benchmark is asked under a protocol; a `GraceError` names the protocols that have it."""
    entry = benchmark(name)
    if protocol == DEMO and entry.mirrors:
        return _demo(entry)
    found = PROTOCOLS.get(protocol, {}).get(name)
    if found is None:
        having = ", ".join(protocols_of(name))
        raise GraceError(f"evaluation.protocol: `{protocol}` does not ask `{name}`; use {having}")
    return found


def _demo(entry: Benchmark) -> Spec:
    prompt = entry.prompt.removeprefix("<image>")
    source = _from("grace/benchmarks/registry.py")
    return Spec(prompt, 8, entry.extraction, "normalised", entry.metric, entry.size, source, stop=("\n",))


def protocols_of(name: str) -> list[str]:
    """The protocols under which a benchmark can be asked."""
    if benchmark(name).mirrors:
        return [DEMO]
    return [protocol for protocol, specs in PROTOCOLS.items() if name in specs]


OWN = {"lmms-eval": LMMS, "vlmeval": KIT, "lm-eval": DEMO}
"""The protocol that a harness's own code asks under."""


def chosen(protocol: str | list[str] | Mapping[str, str | list[str]] | None, harness: str, name: str) -> list[str]:
    """The protocols that a benchmark is asked under, the one that tables show first.

    Args:
        protocol: `evaluation.protocol`: a name, a list, or either by benchmark; None: the registry's choice.
        harness: `evaluation.harness`.
        name: of the benchmark.

    Raises:
        GraceError: a protocol does not ask that benchmark, or the harness asks under another.
    """
    if benchmark(name).mirrors:
        return [DEMO]
    asked = protocol.get(name) if isinstance(protocol, Mapping) else protocol
    own = OWN.get(harness)
    if asked is None:
        asked = own or protocols_of(name)[0]
    names = [asked] if isinstance(asked, str) else list(asked)
    for each in names:
        spec(each, name)
        if own is not None and each != own:
            raise GraceError(
                f"evaluation.protocol: `{each}` is not what {harness} asks `{name}` under; use harness `grace` for it"
            )
    if not names:
        raise GraceError(f"evaluation.protocol: is empty for `{name}`; use {', '.join(protocols_of(name))}")
    return names


def unknown(protocol: str | list[str] | Mapping[str, Any] | None) -> list[str]:
    """Names of protocols or benchmarks in a config that there are none of."""
    if protocol is None:
        return []
    if isinstance(protocol, Mapping):
        return [key for key in protocol if key not in BENCHMARKS] + [n for v in protocol.values() for n in unknown(v)]
    names = [protocol] if isinstance(protocol, str) else list(protocol)
    return [name for name in names if name not in PROTOCOLS and name != DEMO]
