"""The sections that say what is measured: answers to benchmarks, and speed. No torch, as in `grace.config.sections`."""

from typing import Literal

from pydantic import Field, model_validator

from grace.benchmarks.protocols import PROTOCOLS, chosen, unknown
from grace.config.sections import Name, PathName, PositiveInt, PrecisionName, Section


class Evaluation(Section):
    """How predictions are made."""

    benchmarks: list[Name] = Field(min_length=1, description="names in the benchmark registry")
    batch: PositiveInt = Field(default=128, description="questions per forward pass")
    max_new_tokens: PositiveInt | dict[Name, PositiveInt] | None = Field(
        default=None, description="longest answer in tokens, for all benchmarks or by name; null: the protocol's"
    )
    limit: PositiveInt | None = Field(default=None, description="only the first so many questions of each benchmark")
    protocol: str | list[str] | dict[Name, str | list[str]] | None = Field(
        default=None,
        description="how the paper's benchmarks are asked and scored [lmms-eval | vlmevalkit | llava-1.5 | "
        "grace-release], for all or by name; of several the first is in the tables; null: the registry's "
        "choice",
    )
    harness: Literal["grace", "lm-eval", "lmms-eval", "vlmeval"] = Field(
        default="lm-eval",
        description="whose code asks and scores: grace (any protocol), or a harness's own (its own protocol)",
    )
    engine: Literal["grace", "vllm"] = Field(
        default="grace",
        description="what computes the answers: grace (this package), or vllm where that is installed, with harness "
        "grace",
    )
    language: list[PathName] = Field(
        default=[], description="text-only tasks of lm-eval (names, or YAML files of your own), for the language side"
    )
    vlmeval_checkout: str | None = Field(
        default=None, description="folder of a VLMEvalKit checkout, where `harness` is vlmeval"
    )

    @model_validator(mode="after")
    def _own_files(self) -> "Evaluation":
        stems = [task.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml") for task in self.language]
        if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise ValueError(f"language names `{repeated[0]}` twice, and their scores share a file; rename one")
        if self.engine == "vllm" and (self.harness != "grace" or self.language):
            raise ValueError(
                "engine `vllm` answers questions of harness `grace` alone, and no language tasks; change either"
            )
        if nowhere := unknown(self.protocol):
            raise ValueError(f"protocol: there is no `{nowhere[0]}`; protocols are {', '.join(PROTOCOLS)}")
        return self

    def longest(self, benchmark: str) -> int | None:
        """`max_new_tokens` of one benchmark; None: its protocol's."""
        asked = self.max_new_tokens
        return asked.get(benchmark) if isinstance(asked, dict) else asked

    def protocols(self, benchmark: str) -> list[str]:
        """The protocols that a benchmark is asked under, the one of the tables first."""
        return chosen(self.protocol, self.harness, benchmark)


class Bench(Section):
    """The kernel and decoding benchmarks."""

    recipe: Name = Field(
        default="grace", description="recipe whose packed students are timed, beside the bf16 baseline"
    )
    precisions: list[PrecisionName] = Field(default=["int4"], min_length=1, description="at which precisions")
    rows: list[PositiveInt] = Field(
        default=[1, 2, 4, 8, 16, 32, 64, 128], description="M: activation rows of the kernel benchmark"
    )
    batches: list[PositiveInt] = Field(default=[1, 8], description="batch sizes of the decoding benchmark")
    new_tokens: PositiveInt = Field(default=32, description="tokens decoded per sequence")
    repeats: PositiveInt = Field(default=5, description="timed repetitions; the median is reported")
