"""The outputs that docs/compare.md shows are those of the commands, on simulated results; `…` stands for any text."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from fake_results import make_results

from grace.diff.compare import diff
from grace.errors import GraceError
from grace.files import read_json, sha256, whole_folder, write_json, write_manifest
from grace.provenance.cell import cell
from grace.provenance.snakemake_records import write_rows
from grace.provenance.tree import provenance
from grace.provenance.verify import verify
from grace.report.tables.write import write_tables
from grace.results.read import read_results

PAGE = (Path(__file__).parents[2] / "docs/compare.md").read_text()
STUDENT = "results/demo/students/grace/int4/seed0"
COMMITS = {"model": "4f2a9c1e", "predictions": "b81d03f7"}


def block(name: str) -> tuple[str, list[str]]:
    """A marked block's command and the lines below it."""
    (text,) = re.findall(rf"<!-- {name} -->\n```\n(.*?)```", PAGE, re.DOTALL)
    command, *shown = text.splitlines()
    return command, [line.rstrip() for line in shown if line.strip(" …")]


def assert_shown(name: str, said: str) -> None:
    """Every line of the block is one of the output, in its order; hashes differ between versions of libraries."""
    (_, shown), rest = block(name), [line.rstrip() for line in said.splitlines()]
    assert shown, said
    for line in shown:
        pattern = re.sub(r"\b[0-9a-f]{12}\b", "[0-9a-f]{12}", ".*".join(map(re.escape, line.split("…"))))
        found = [place for place, text in enumerate(rest) if re.fullmatch(pattern, text)]
        assert found, f"{line}\nis none of\n" + "\n".join(rest)
        rest = rest[found[0] + 1 :]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated results of one seed with their tables, and the records of one student's training and evaluation."""
    root = tmp_path_factory.mktemp("versions")
    folder = make_results(root / "results/demo", seeds=(0,), questions=80)
    write_tables(read_results(folder), folder / "tables")
    write_manifest(folder / "data")
    frozen, data = "results/demo/config/students/grace/int4/seed0.json", "results/demo/data/manifest.json"
    write_json(root / frozen, {"seed": 0})
    write_json(folder / "config/evaluation.json", {"batch": 128})
    rows = {}
    for part, rule, inputs in (
        ("model", "distil", [frozen, data]),
        ("predictions", "evaluate", ["results/demo/config/evaluation.json", data, f"{STUDENT}/model/manifest.json"]),
    ):
        about = read_json(root / STUDENT / part / "environment.json")
        about["code"] |= {"revision": COMMITS[part], "modified": False}
        write_json(root / STUDENT / part / "environment.json", about)
        output = f"{STUDENT}/{part}/manifest.json"
        record = {
            "rule": rule, "log": [], "starttime": 1.0, "endtime": 2.0, "input": inputs,
            "shellcmd": f"grace {rule} --out …",
            "input_checksums": {name: f"sha256:{sha256(root / name)}" for name in inputs},
        }  # fmt: skip
        rows[output] = {"output": output, "bytes": 1, "sha256": sha256(root / output), "record": record}
    write_rows(folder / "provenance.jsonl", rows)
    return root


def test_the_chain(root: Path, capsys: pytest.CaptureFixture) -> None:
    provenance(root / STUDENT / "predictions")
    assert_shown("provenance", capsys.readouterr().out)
    assert block("provenance")[0] == f"$ grace provenance {STUDENT}/predictions"


def test_a_cell(root: Path, capsys: pytest.CaptureFixture) -> None:
    words = re.fullmatch(r'\$ grace provenance (\S+) --cell "(.*)" (\w+)', block("cell")[0])
    assert words
    cell(root / words[1], words[2], words[3])
    assert_shown("cell", capsys.readouterr().out)


def test_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fifteen answers of each of two seeds are wrong in the second version."""
    before, after = (make_results(tmp_path / name / "results/demo", seeds=(0, 1), questions=80) for name in "ab")
    for seed in (0, 1):
        folder = after / f"students/grace/int4/seed{seed}/predictions"
        frame = pd.read_parquet(folder / "colour.parquet")
        right = frame.index[frame["score"] == 1][:15]
        frame.loc[right, ["score", "prediction"]] = [0.0, "green"]
        frame.to_parquet(folder / "colour.parquet")
        about = json.loads((folder / "manifest.json").read_text())
        about["benchmarks"]["colour"] |= {"sha256": sha256(folder / "colour.parquet"), "score": frame["score"].mean()}
        write_manifest(folder, **{key: value for key, value in about.items() if key != "files"})
    capsys.readouterr()
    diff(before, after)
    assert_shown("diff", capsys.readouterr().out)


def test_what_verify_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data", "students/grace/int4/seed0/packed"):
        with whole_folder(tmp_path / "results/demo" / name) as part:
            for file in ("model.safetensors", "config.json"):
                (part / file).write_text(name)
    packed = tmp_path / STUDENT / "packed"
    (packed / "model.safetensors").write_text("another")
    (packed / "config.json").unlink()
    (packed / "notes.txt").write_text("new")
    (packed.parent / ".model.12-abc.part").mkdir()
    (packed.parent / ".model.12-abc.part/config.json").write_text("half")
    with pytest.raises(GraceError) as error:
        verify(Path("results/demo"))
    assert_shown("verify", f"grace: {error.value}")
    assert len(block("verify")[1]) == len(str(error.value).splitlines())
