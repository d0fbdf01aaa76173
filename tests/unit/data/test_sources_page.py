"""docs/my-data.md, followed to the letter."""

import json
import re
from pathlib import Path

import pytest
import yaml
from own_data import image_bytes, report, rows

from grace import cli
from grace.config.sections import FilesData, Source
from grace.demo.processor import build_processor

PAGE = (Path(__file__).parents[3] / "docs/my-data.md").read_text()


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_example_ends_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/images/more").mkdir(parents=True)
    Path("data/images/a.jpg").write_bytes(image_bytes("red"))
    Path("data/images/more/b.png").write_bytes(image_bytes("blue", format="PNG"))
    Path("data/conversations.json").write_text(block("json"))
    Path("data/more.jsonl").write_text(block("jsonl"))
    Path("run.json").write_text(json.dumps({**yaml.safe_load(block("yaml")), "benchmarks": []}))
    build_processor().save_pretrained("model")
    monkeypatch.setattr("sys.argv", ["grace", "prepare", "--run", "run.json", "--processor", "model", "--out", "out"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    lines = Path("out/report.md").read_text().splitlines()
    assert [line for line in block("markdown").splitlines() if line not in lines] == []
    assert set(rows(Path("out"))) == {"shirt", "two", "words", "parts", "tag", "parts#2", "tag#2"}
    parts = rows(Path("out"))["parts"]
    assert [m["role"] for m in parts["messages"]] == ["system", "user", "assistant"]
    assert [p["type"] for p in parts["messages"][1]["content"]] == ["text", "image"]
    assert [entry["id"] for entry in report(Path("out"))["skipped"]] == ["lost"]


def test_every_key_is_explained():
    explained = set(
        re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in PAGE.splitlines() if line[:3] == "| `"))
    )
    keys = {*Source.model_fields, *FilesData.model_fields} - {"source", "sources"}
    assert keys <= explained
