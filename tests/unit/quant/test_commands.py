"""`grace quantize` on the demo's own data, from the frozen parameters to the packed folder."""

import re
from pathlib import Path

import pytest
import torch

from grace.config.job_parameters import QuantizeRun
from grace.config.schema import Architecture, DemoData, Quantization
from grace.demo.prepare import prepare
from grace.errors import GraceError
from grace.files import check_manifest, read_json, write_json
from grace.models import build_llava, decoder_linears, load_model, load_processor
from grace.quant import dequantize, read_quantization
from grace.quant.commands import quantize
from grace.quant.pack import pack


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("experiment")
    prepare(DemoData(images=6, questions_per_image=2), [], home / "data")
    processor = load_processor(home / "data" / "processor")
    shape = Architecture(hidden_size=64, intermediate_size=96, layers=2, heads=2)
    model = build_llava(shape, processor, home / "data" / "vision_tower", seed=0).to(torch.bfloat16)
    model.save_pretrained(home / "baseline")
    processor.save_pretrained(home / "baseline")
    return home


def frozen(folder, method, group_size=32, family="llava", bits=4):
    settings = Quantization(group_size=group_size, calibration=4)
    run = QuantizeRun(
        family=family, post_training=method, bits=bits, quantization=settings, outliers=True, seed=0
    )  # fmt: skip
    write_json(folder / "run.json", run.model_dump())
    return folder / "run.json"


@pytest.mark.parametrize(
    ("method", "bits"), [("rtn", 4), *((method, bits) for method in ("awq", "gptq") for bits in (2, 3, 4))]
)
def test_a_student_folder_that_packs(home, tmp_path, method, bits):
    quantize(frozen(tmp_path, method, bits=bits), home / "baseline", home / "data", tmp_path / "student")
    stored = read_quantization(tmp_path / "student")
    model = load_model(tmp_path / "student")
    assert model.dtype == torch.bfloat16 and (stored.method, stored.bits, stored.group_size) == (method, bits, 32)
    linears = decoder_linears(model)
    assert set(stored.layers) == set(linears)
    for name, linear in linears.items():
        assert torch.equal(linear.weight, dequantize(*stored[name]))
    assert check_manifest(tmp_path / "student")["run"]["post_training"] == method
    baseline, student = ({p.name for p in folder.iterdir()} for folder in (home / "baseline", tmp_path / "student"))
    own = {"manifest.json", "environment.json", "quantization.json", "quantization.safetensors"}
    assert student - baseline == own and baseline <= student
    pack(tmp_path / "student", tmp_path / "packed")
    packed = load_model(tmp_path / "packed")
    for name, linear in decoder_linears(packed).items():
        assert torch.equal(linear.weight, linears[name].weight)


def test_the_same_run_gives_the_same_bytes(home, tmp_path):
    for out in ("one", "two"):
        quantize(frozen(tmp_path, "gptq"), home / "baseline", home / "data", tmp_path / out)
    assert read_json(tmp_path / "one" / "manifest.json") == read_json(tmp_path / "two" / "manifest.json")


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_group_that_does_not_divide_is_found_before_any_work(home, tmp_path, method):
    with pytest.raises(GraceError, match=r"down_proj: its input of 96 is not a multiple of group_size 64"):
        quantize(frozen(tmp_path, method, 64), home / "baseline", tmp_path / "no_data", tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_the_parameters_on_the_page_round_without_data(home, tmp_path):
    page = (Path(__file__).parents[3] / "docs/deploy.md").read_text()
    (written,) = re.findall(r"echo '(\{.*\})' > rounding\.json", page)
    (tmp_path / "rounding.json").write_text(written.replace('"group_size": 128', '"group_size": 32'))
    quantize(tmp_path / "rounding.json", home / "baseline", None, tmp_path / "student")
    stored = read_quantization(tmp_path / "student")
    assert (stored.method, stored.bits, stored.group_size) == ("rtn", 4, 32)


def test_a_method_that_needs_data_says_so(home, tmp_path):
    with pytest.raises(GraceError, match=r"run\.json: gptq looks at training conversations; give --data"):
        quantize(frozen(tmp_path, "gptq"), home / "baseline", None, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_model_of_another_family_is_refused(home, tmp_path):
    with pytest.raises(GraceError, match=r"baseline: config\.json says llava and the configuration family: qwen2_vl"):
        quantize(frozen(tmp_path, "rtn", family="qwen2_vl"), home / "baseline", home / "data", tmp_path / "student")
    assert not (tmp_path / "student").exists()
