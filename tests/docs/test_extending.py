"""The examples of docs/extending*.md, followed to the letter (an objective's is followed in tests/unit/distill)."""

import json
import re
from functools import partial
from pathlib import Path
from types import ModuleType

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from evaluate_models import make_image, write_model
from quant_models import llava_batch, make_student, tiny
from safetensors.torch import load_file

import grace.evaluate.commands as evaluation
from grace import families
from grace.benchmarks import metrics, protocols, registry
from grace.files import read_json
from grace.quant import card, export, read_quantization
from grace.quant.calibration import round_model
from grace.quant.grid import dequantize
from grace.quant.pack import pack

PAGE = "\n".join(page.read_text() for page in sorted((Path(__file__).parents[2] / "docs").glob("extending*.md")))


def code(section: str) -> str:
    """The Python block of a section."""
    body = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    return block


def module(section: str) -> ModuleType:
    made = ModuleType(section.replace(" ", "_"))
    exec(compile(code(section), "docs/extending*.md", "exec"), made.__dict__)
    return made


def test_a_quantiser():
    """Its codes are what the model computes with, and no worse by its own measure than the widest scales."""
    weighted = module("A quantiser")
    model, batches = tiny("llava"), [llava_batch(seed) for seed in range(3)]
    rounded = round_model(model, batches, partial(weighted.round_layer, bits=4, group_size=32))
    after = model.state_dict()
    assert len(rounded) == 14
    for name, (codes, scales) in rounded.items():
        assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16 and codes.abs().max() <= 8
        assert torch.equal(after[f"{name}.weight"], dequantize(codes, scales).to(after[f"{name}.weight"].dtype))
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    energy = torch.logspace(-2, 2, 64)

    def error(scales: torch.Tensor) -> float:
        change = dequantize(weighted.quantize(weight, scales, 3), scales).float() - weight
        return float((change.square() * energy).sum())

    assert error(weighted.weighted_scales(weight, energy, 3, 32)) < 0.9 * error(weighted.largest_scales(weight, 3, 32))


def test_an_exporter(tmp_path, monkeypatch):
    """The export holds the student's codes and scales, and a layout that loses some is refused."""
    layout = module("An exporter")
    monkeypatch.setitem(export.LAYOUTS, "byte", layout)
    monkeypatch.setattr(export, "FORMATS", (*export.FORMATS, "byte"))
    monkeypatch.setitem(card.FORMATS, "byte", ("one signed byte a code", "byte"))
    pack(make_student(tmp_path / "student", "llava"), tmp_path / "packed")
    export.export(tmp_path / "packed", "byte", tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    names = [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]
    stored = read_quantization(tmp_path / "student")
    assert len(names) == len(stored.layers)
    want = sorted(stored[name][0].sum(dtype=torch.int64).item() for name in stored.layers)
    assert sorted(tensors[f"{name}.codes"].sum(dtype=torch.int64).item() for name in names) == want
    assert "one signed byte a code" in (tmp_path / "out/README.md").read_text()
    monkeypatch.setattr(layout, "tensor", lambda model, key, kind: model[key][kind == "scales"] * 0)
    with pytest.raises(export.GraceError, match="reads back with other codes"):
        export.export(tmp_path / "packed", "byte", tmp_path / "again")


def test_a_benchmark(tmp_path, monkeypatch):
    """It is asked as its spec says, and its metric can be made again from the rows."""
    example = module("A benchmark")
    monkeypatch.setitem(registry.BENCHMARKS, "signs", example.ENTRY)
    monkeypatch.setitem(protocols.PROTOCOLS, "own", {"signs": example.HOW})
    monkeypatch.setitem(protocols.SOURCES, "own", "this test")
    monkeypatch.setitem(metrics.METRICS, "worst_group", example.worst_group)
    write_model(tmp_path / "model")
    rows = [
        {"id": str(i), "question": "what is it", "answer": "red", "category": "ab"[i % 2],
         "image": {"bytes": make_image(i), "path": f"{i}.png"}}
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "data/benchmarks").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/benchmarks/signs.parquet")
    settings = re.search(r"\n(evaluation: .*)\n", PAGE)[1]
    asked = yaml.safe_load(settings)["evaluation"] | {"limit": 4, "batch": 4}
    (tmp_path / "run.json").write_text(json.dumps({"family": "llava", "evaluation": asked}))
    evaluation.evaluate(tmp_path / "run.json", tmp_path / "model", tmp_path / "data", tmp_path / "out")
    entry = read_json(tmp_path / "out/manifest.json")["benchmarks"]["signs"]
    assert entry["protocol"] == "own" and entry["questions"] == 4 and set(entry["also"]) == {"accuracy", "worst"}
    assert example.worst_group(pd.DataFrame({"score": [1.0, 0.0, 1.0, 1.0], "group": list("aabb")})) == {
        "accuracy": 0.75,
        "worst": 0.5,
    }


def test_a_family():
    """The page shows the file that ships, which tests/unit/models holds to the contract."""
    assert code("A family") == Path(families.__file__).with_name("qwen2_5_vl.py").read_text()
    assert families.FAMILIES["qwen2_5_vl"].processor in code("A family")


def test_what_the_page_names_is_in_the_file_that_it_names():
    """`NAME` in `path`: the lists that need a line."""
    root = Path(__file__).parents[2]
    named = re.findall(r"`(\w+)`(?:\sof\s`\w+`)?(?:[^`.;]{0,60})?\s(?:in|of)\s`([\w/]+\.py)`", PAGE)
    assert len(named) > 10
    for name, path in named:
        file = root / path if path.startswith(("tests/", "workflow/")) else root / "workflow/grace" / path
        assert re.search(rf"\b{name}\b", file.read_text()), f"{path} has no {name}"
