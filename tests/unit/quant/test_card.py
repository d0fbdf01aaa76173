"""Model cards as a hub's library reads them, for the packed folder and each export."""

import ast
import re

import pytest
from chat_models import talking_student
from huggingface_hub import ModelCard

from grace.errors import GraceError
from grace.files import read_json
from grace.quant.card import Origin, model_card, scores_of, write_card
from grace.quant.export import export
from grace.quant.pack import pack

METRICS = {
    "scores": {
        "grace": {"int4": {"benchmarks": {"gqa": 61.25, "pope": 84.0}, "average": 72.63, "average_stderr": 0.41}}
    }
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    pack(talking_student(folder / "student", "llava-siglip"), folder / "packed")
    for format in ("awq", "gptq", "gguf"):
        export(folder / "packed", format, folder / format)
    return folder


@pytest.mark.parametrize("form", ["packed", "awq", "gptq", "gguf"])
def test_each_folder_has_a_card_that_asks_about_an_image(folders, form):
    card = ModelCard.load(folders / form / "README.md")
    about = card.data.to_dict()
    assert about["pipeline_tag"] == "image-text-to-text" and "quantized" in about["tags"]
    assert about["library_name"] == ("gguf" if form == "gguf" else "transformers")
    programs = {"packed": 3, "awq": 2, "gptq": 2, "gguf": 1}[form]
    fences = re.findall(r"```(python|sh)\n(.*?)```", card.text, re.DOTALL)
    assert len(fences) == programs and all("image.jpg" in code for _, code in fences)
    for language, code in fences:
        if language == "python":
            ast.parse(code)
    if form != "gguf":
        assert "accelerate torchvision" in card.text, "transformers builds Qwen's processors with torchvision alone"
    if "from vllm" in card.text:
        assert 'if __name__ == "__main__":' in card.text, "vLLM starts processes that import the file again"
    assert ("VLLM_CPU_INT4_W4A8=0" in card.text) == (form == "packed")
    assert "SHA-256" in card.text and str(folders) not in card.content


@pytest.mark.parametrize(
    ("bits", "said"), [(2, "for NVIDIA GPUs alone"), (3, "for NVIDIA GPUs alone"), (8, "on a GPU")]
)
def test_where_vllm_computes_another_width(folders, bits, said):
    text = model_card(read_json(folders / "packed/card.json") | {"bits": bits}, "pack-quantized")
    assert said in text and "VLLM_CPU_INT4_W4A8" not in text


def test_what_the_publisher_adds(folders, tmp_path):
    origin = Origin(
        "llama2", "llava-hf/llava-1.5-7b-hf", ("liuhaotian/LLaVA-Instruct-150K",), scores_of(METRICS, "grace.int4")
    )
    write_card(folders / "packed", origin, tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "llama2" and card.data.base_model == "llava-hf/llava-1.5-7b-hf"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.datasets == ["liuhaotian/LLaVA-Instruct-150K"]
    assert "| gqa | 61.25 |" in card.text and "| average | 72.63 ± 0.41 |" in card.text


def test_what_is_missing_is_said(folders, tmp_path):
    with pytest.raises(GraceError, match=r"--row qat.int4: not in the metrics; there are grace\.int4"):
        scores_of(METRICS, "qat.int4")
    with pytest.raises(GraceError, match=r"has no card\.json"):
        write_card(folders / "student", None, tmp_path / "README.md")
