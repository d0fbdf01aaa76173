"""The decoding benchmark: one run over plain and packed folders, and what memory is counted."""

import json
from functools import partial
from pathlib import Path

import pandas
import pytest
import torch
from infer_models import save_llava, save_packed
from torch import nn

from grace.bench import decode as bench
from grace.bench.commands import decode
from grace.bench.decode import model_name
from grace.bench.memory import peak_bytes, weight_bytes
from grace.infer.decode import Session

CPU = torch.device("cpu")
COLUMNS = [
    "model",
    "precision",
    "device",
    "batch",
    "cache",
    "prompt_tokens",
    "new_tokens",
    "prefill_ms",
    "tokens_per_second",
    "weight_mib",
    "peak_mib",
]


def test_peak_counts_what_lives_together():
    def work() -> None:
        kept = torch.zeros(1000)
        for _ in range(5):
            kept = kept + 1  # old and new live together for a moment
        kept.view(10, 100).t()

    assert peak_bytes(work, CPU) == 8000


def test_weights_count_once_and_with_buffers():
    layer = nn.Linear(4, 4, bias=False)
    tied = nn.Linear(4, 4, bias=False)
    tied.weight = layer.weight
    both = nn.Sequential(layer, tied)
    both.register_buffer("more", torch.zeros(8, dtype=torch.int8))
    assert weight_bytes(both) == 64 + 8


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/r/results/demo/students/grace/int4/seed0/packed", "grace/int4/seed0"),
        ("/r/results/demo/students/baseline/bf16/seed1/model", "baseline/bf16/seed1"),
        ("/r/results/demo/teacher/model", "teacher"),
        ("/r/llava-1.5-7b-hf", "llava-1.5-7b-hf"),
    ],
)
def test_names_are_those_of_the_results(path, name):
    assert model_name(Path(path)) == name


def test_one_run_over_plain_and_packed(tmp_path):
    plain = save_llava(tmp_path / "teacher" / "model")
    packed = save_packed(plain, tmp_path / "students" / "grace" / "int4" / "seed0" / "packed")
    run = tmp_path / "run.json"
    bench = {"batches": [1, 3], "new_tokens": 4, "repeats": 2}
    run.write_text(json.dumps({"family": "llava", "group_size": 32, "bench": bench}))
    decode(run, [plain, packed], tmp_path / "bench" / "decode.csv")
    table = pandas.read_csv(tmp_path / "bench" / "decode.csv")
    assert list(table.columns) == COLUMNS
    assert list(zip(table.model, table.precision, table.batch, strict=True)) == [
        ("teacher", "bf16", 1), ("grace/int4/seed0", "int4", 1), ("teacher", "bf16", 3),
        ("grace/int4/seed0", "int4", 3),
    ]  # fmt: skip
    assert (table.prefill_ms > 0).all() and (table.tokens_per_second > 0).all()
    assert (table.peak_mib > table.weight_mib).all()
    assert table.prompt_tokens.nunique() == 1 and (table.cache == 16).all()
    bf16, int4 = table.weight_mib[0], table.weight_mib[1]
    assert int4 < bf16
    about = json.loads((tmp_path / "bench" / "decode.json").read_text())
    assert "live tensors" in about["peak_mib"] and about["machine"]["versions"]["torch"] == torch.__version__


def test_a_packed_model_is_measured_with_both_caches_where_it_can_be(tmp_path, monkeypatch):
    """As on a GPU: the fused step, here in Triton's interpreter, with keys and values in 16 bits and in 8."""
    plain = save_llava(tmp_path / "teacher" / "model")
    packed = save_packed(plain, tmp_path / "students" / "grace" / "int4" / "seed0" / "packed")
    monkeypatch.setattr(bench, "takes_fused_step", lambda network: True)
    monkeypatch.setattr(bench, "Session", partial(Session, fused=True))
    rows = bench.bench_decode([plain, packed], [2], new_tokens=3, repeats=1, device=CPU)
    assert [(row["precision"], row["cache"]) for row in rows] == [("bf16", 16), ("int4", 16), ("int4", 8)]
    assert rows[2]["peak_mib"] < rows[1]["peak_mib"]
