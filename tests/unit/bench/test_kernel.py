"""The kernel benchmark: shapes read from folders, correctness before speed, and the tables of both subcommands."""

import json

import pandas
import pytest
import torch
from infer_models import save_llava, save_packed

from grace.bench import kernel as kernel_module
from grace.bench.backend import Backend
from grace.bench.backends import TORCH_CPU
from grace.bench.commands import decode, kernel
from grace.bench.kernel import bench_kernel
from grace.bench.shapes import decoder_shapes
from grace.bench.timing import copies_past_cache, interleaved_medians
from grace.errors import GraceError

CPU = torch.device("cpu")
COLUMNS = [
    "backend",
    "device",
    "dtype",
    "shape",
    "out_features",
    "in_features",
    "m",
    "group_size",
    "microseconds",
    "dense_microseconds",
    "speedup",
    "floor_microseconds",
    "floor_share",
    "relative_error",
]


LIMITS = {"copy_bytes_per_second": 1e10, "flops_per_second": 1e11}


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(kernel_module.machine, "ceilings", lambda device: dict(LIMITS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    plain = save_llava(root / "plain", key_value_heads=2)
    return plain, save_packed(plain, root / "packed")


def test_shapes_are_the_same_plain_and_packed(folders):
    plain, packed = folders
    expected = {
        "model q|o": (64, 64), "model k|v": (32, 64), "model gate|up": (128, 64), "model down": (64, 128),
        "model q+k+v": (128, 64), "model gate+up": (256, 64),
    }  # fmt: skip
    assert decoder_shapes(plain) == expected
    assert decoder_shapes(packed) == expected


def test_shapes_of_what_is_no_model(tmp_path):
    with pytest.raises(GraceError, match=r"has no \*\.safetensors"):
        decoder_shapes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12")
    with pytest.raises(GraceError, match="not a whole safetensors file"):
        decoder_shapes(tmp_path)


def test_a_beaten_ceiling_is_measured_again(monkeypatch):
    """The first one is measured while something else runs; the highest counts, for every row."""
    measured = iter([{"copy_bytes_per_second": 1e3, "flops_per_second": 1e3}, LIMITS, LIMITS])
    monkeypatch.setattr(kernel_module.machine, "ceilings", lambda device: next(measured))
    table, limits = bench_kernel({"a": (32, 64)}, [1, 64], 32, 2, CPU)
    assert limits == LIMITS and len(list(measured)) == 1
    assert all(row["floor_share"] == row["floor_microseconds"] / row["microseconds"] for row in table)
    assert max(row["floor_share"] for row in table) < 1


def test_rows_and_floor():
    table, _ = bench_kernel({"a": (32, 64), "odd": (24, 64)}, [1, 64], 32, 2, CPU)
    assert [(row["shape"], row["m"], row["backend"]) for row in table] == [
        ("a", 1, "torch int4 (CPU)"),
        ("a", 64, "torch int4 (CPU)"),
        ("odd", 1, "dequantise, then dense"),
        ("odd", 64, "dequantise, then dense"),
    ]
    one, many = table[:2]
    assert list(one) == COLUMNS
    assert one["floor_microseconds"] == pytest.approx((32 * 64 / 2 + 32 * 2 * 2 + 96 * 2) / 1e10 * 1e6)
    assert many["floor_microseconds"] == pytest.approx(2 * 64 * 32 * 64 / 1e11 * 1e6)
    for row in table:
        assert row["speedup"] == pytest.approx(row["dense_microseconds"] / row["microseconds"])
        assert 0 < row["relative_error"] < 1e-2


def test_a_wrong_product_is_an_error_not_a_time():
    for wrong in (
        lambda x, p: TORCH_CPU.gemm(x, p) * 1.02,
        lambda x, p: torch.empty(len(x), 32).bfloat16().fill_(float("nan")),
    ):
        backend = Backend("wrong", TORCH_CPU.serves, TORCH_CPU.prepare, wrong)
        with pytest.raises(GraceError, match="wrong: wrong product at 32 x 64"):
            bench_kernel({"a": (32, 64)}, [1], 32, 1, CPU, backends=[backend])


def test_another_packages_failure_is_left_out_and_said(capsys):
    def fails(*_):
        raise RuntimeError("no kernel image")

    own = TORCH_CPU
    unprepared = Backend("elsewhere", own.serves, fails, own.gemm, foreign=True)
    wrong = Backend("elsewhere too", own.serves, own.prepare, lambda x, p: own.gemm(x, p) * 2, foreign=True)
    table, _ = bench_kernel({"a": (32, 64)}, [1, 2], 32, 1, CPU, backends=[own, unprepared, wrong])
    assert [row["backend"] for row in table] == [own.name] * 2
    said = capsys.readouterr().err
    assert "left out: elsewhere at 32 x 64: no kernel image" in said and said.count("elsewhere too at a, M = ") == 2
    with pytest.raises(RuntimeError, match="no kernel image"):
        bench_kernel({"a": (32, 64)}, [1], 32, 1, CPU, backends=[Backend("ours", own.serves, fails, own.gemm)])


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(GraceError, match="96 inputs, which groups of 64 do not divide"):
        bench_kernel({"a": (32, 96)}, [1], 64, 1, CPU)


def test_medians_are_of_interleaved_rounds():
    seen: list[str] = []
    calls = {name: [lambda name=name: seen.append(name)] for name in "ab"}
    medians = interleaved_medians(calls, 3, CPU, shortest=0)
    assert set(medians) == {"a", "b"} and all(value > 0 for value in medians.values())
    assert "".join(seen) == "aabb" + "ab" * 3  # two calls each to warm up, then rounds


def test_copies_miss_the_cache_but_stay_few():
    assert copies_past_cache(100 << 20, 32 << 20, 4) == 1
    assert copies_past_cache(20 << 20, 32 << 20, 8) == 4
    assert copies_past_cache(1 << 10, 32 << 20, 4) == 4


def test_verb_writes_table_and_machine(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("grace.bench.commands.FIELD_SHAPES", {"field": (128, 128)})
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"family": "llava", "group_size": 32, "bench": {"rows": [1, 2], "repeats": 2}}))
    kernel(run, folders[1], tmp_path / "bench" / "kernel.csv")
    table = pandas.read_csv(tmp_path / "bench" / "kernel.csv")
    assert list(table.columns) == COLUMNS and len(table) == 2 * 7
    about = json.loads((tmp_path / "bench" / "kernel.json").read_text())
    assert about["machine"]["threads"] == torch.get_num_threads()
    assert about["ceilings"]["copy_bytes_per_second"] == 1e10
    run.write_text(json.dumps({"family": "qwen2_vl", "group_size": 32, "bench": {"rows": [1], "repeats": 1}}))
    for verb, models in ((kernel, folders[1]), (decode, [folders[1]])):
        with pytest.raises(GraceError, match=r"config\.json says llava and the configuration family: qwen2_vl"):
            verb(run, models, tmp_path / "kernel.csv")
    run.write_text('{"family": "llava"}')
    with pytest.raises(GraceError, match="not the frozen parameters of this job"):
        kernel(run, folders[1], tmp_path / "kernel.csv")
