"""The engine vLLM, with a stand-in of its interface: what it is given, and what is done with what it gives back.

`tests/programs/ask_vllm_engine.py` asks the real one.
"""

import importlib.util
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from evaluate_models import make_image, write_model
from official_rows import OFFICIAL

import grace.evaluate.commands as commands
from grace.arithmetic import SETTINGS, settle
from grace.config.evaluation import Evaluation
from grace.errors import GraceError
from grace.evaluate.runner import Runner
from grace.files import read_json
from grace.infer.prefill import Prompt, image_features
from grace.models import load_model, load_processor
from grace.results.predictions import read_rows


def write(folder, name: str, rows: list[dict]) -> None:
    (folder / "data/benchmarks").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"data/benchmarks/{name}.parquet")


SPARE = 4  # visual tokens of an image of the tests


class StandIn:
    """vllm.LLM's interface over transformers' model: prompts come with one token an image, and go back expanded."""

    def __init__(self, folder: str, **settings) -> None:
        assert os.environ["VLLM_CPU_INT4_W4A8"] == "0", "the packed model is asked, not one with rounded activations"
        settle()  # as its processes do, which import what started them
        assert os.environ["ONEDNN_MAX_CPU_ISA"] == "DEFAULT", (
            "its products need instructions that this package leaves out"
        )
        self.settings = settings
        self.model, self.processor = load_model(folder), load_processor(folder)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: ended.append(folder)))

    def generate(self, asked, how, use_tqdm):
        runner = Runner(self.model, self.processor, len(asked))
        found = []
        for one in asked:
            ids = [t for token in one["prompt_token_ids"] for t in [token] * (SPARE if token == runner.image else 1)]
            images = one.get("multi_modal_data", {}).get("image", [])
            assert all(image.mode == "RGB" for image in images)
            seen = runner.encoder.pixels(images) if images else {}
            prompt = Prompt(ids, image_features(self.model, seen) if images else ())
            taken: list[tuple] = []
            runner._answers = lambda *answer, taken=taken: taken.append(answer)
            with torch.inference_mode():
                runner._generate([prompt], how.max_tokens)
            ((tokens, logprob, _),) = taken
            tokens, logprob = tokens[0].tolist(), float(logprob[0])
            end = next((n + 1 for n, token in enumerate(tokens) if token in how.stop_token_ids), len(tokens))
            entries = [{token: SimpleNamespace(logprob=logprob / end)} for token in tokens[:end]]
            output = SimpleNamespace(token_ids=tokens[:end], logprobs=entries)
            found.append(SimpleNamespace(prompt_token_ids=[*ids, *self.extra], outputs=[output]))
        return found

    extra: tuple[int, ...] = ()


ended: list[str] = []


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM = StandIn
    module.SamplingParams = lambda **settings: SimpleNamespace(**settings)
    module.__spec__ = importlib.util.spec_from_loader("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "1")  # vLLM's own choice
    monkeypatch.setattr(StandIn, "extra", ())
    ended.clear()
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    write_model(folder / "model")
    for name in ("gqa", "mmmu", "hallusionbench"):  # one image, two, none
        write(folder, name, [OFFICIAL[name](i) for i in range(6)])
    return folder


def run(folder, engine: str, out: str) -> dict:
    evaluation = {
        "benchmarks": ["gqa", "mmmu", "hallusionbench"], "batch": 4, "max_new_tokens": 3, "harness": "grace",
        "protocol": "vlmevalkit", "limit": 100, "engine": engine,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"family": "llava", "evaluation": evaluation}))
    commands.evaluate(folder / "run.json", folder / "model", folder / "data", folder / out)
    return read_json(folder / out / "manifest.json")


def test_the_same_is_asked_and_kept(folder, vllm):
    ours, theirs = run(folder, "grace", "grace"), run(folder, "vllm", "vllm")
    assert theirs["harness"]["engine"] == "vllm, of no known version" and "engine" not in ours["harness"]
    assert ended == [str(folder / "model")] and os.environ.items() >= SETTINGS.items()
    for name in ours["benchmarks"]:
        one, other = (read_rows(folder / out / f"{name}.parquet") for out in ("grace", "vllm"))
        for column in ("sample_id", "prompt_hash", "prediction", "extracted", "target", "score"):
            assert one[column].tolist() == other[column].tolist(), (name, column)
        assert other["logprob"].to_numpy() == pytest.approx(one["logprob"].to_numpy(), abs=0.05)  # bf16, another batch
        assert other["entropy"].isna().all() and one["entropy"].notna().all()
    run(folder, "vllm", "vllm")
    assert len(ended) == 1, "answers that hold are not asked again"


def test_another_reading_of_the_prompt_is_refused(folder, vllm, monkeypatch):
    monkeypatch.setattr(StandIn, "extra", (5,))
    with pytest.raises(GraceError, match=r"vLLM read \d+ tokens of prompt that are not this package's"):
        run(folder, "vllm", "refused")


def test_a_broken_image_is_named_and_the_others_are_asked(folder, vllm, tmp_path):
    (tmp_path / "model").symlink_to(folder / "model")
    rows = [OFFICIAL["gqa"](i) for i in range(3)]
    rows[1]["image"] = {"bytes": make_image(1)[:80], "path": "cut.png"}
    write(tmp_path, "gqa", rows)
    for name in ("mmmu", "hallusionbench"):
        write(tmp_path, name, [OFFICIAL[name](i) for i in range(6)])
    with pytest.raises(GraceError, match=r"1 of 3 rows cannot be asked \(row 1 has an image that cannot be decoded"):
        run(tmp_path, "vllm", "out")
    assert (tmp_path / "out/mmmu.parquet").is_file()


def test_without_vllm_the_sentence_says_what_to_do(folder):
    assert importlib.util.find_spec("vllm") is None
    with pytest.raises(
        GraceError, match="vllm is not installed in this environment; `pip install vllm` there, or set engine"
    ):
        run(folder, "vllm", "none")


def test_what_the_engine_cannot_do_is_refused():
    with pytest.raises(ValueError, match="engine `vllm` answers questions of harness `grace` alone"):
        Evaluation(benchmarks=["colour"], engine="vllm", harness="lm-eval")
    with pytest.raises(ValueError, match="and no language tasks"):
        Evaluation(benchmarks=["colour"], engine="vllm", harness="grace", language=["wiki"])
