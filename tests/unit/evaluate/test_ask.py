"""The paper's benchmarks in official formats, asked by this package under every protocol."""

import json
import sys
from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluate_models import make_image, write_model
from official_rows import CHOICES, OFFICIAL, encoded, image

import grace.evaluate.commands as commands
from grace.benchmarks.metrics import METRICS
from grace.benchmarks.protocols import PROTOCOLS, spec
from grace.benchmarks.scores import SCORES
from grace.errors import GraceError
from grace.files import read_json
from grace.results.predictions import about, read_rows

SCORED = [(protocol, name) for protocol, specs in PROTOCOLS.items() for name, how in specs.items() if not how.hidden]
ROWS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ask")
    write_model(folder / "model")
    for name in OFFICIAL:
        write(folder, name, [OFFICIAL[name](i) for i in range(ROWS)])
    write(folder, "vlmevalkit/mmstar", [OFFICIAL["mmstar"](i) | CHOICES for i in range(ROWS)])
    return folder


@pytest.fixture
def folder(made, tmp_path):
    (tmp_path / "model").symlink_to(made / "model")
    return tmp_path


def write(folder, name: str, rows: list[dict]) -> None:
    path = folder / f"data/benchmarks/{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def run(folder, names, protocol, out: str = "out", **settings) -> dict:
    evaluation = {
        "benchmarks": list(names), "batch": 4, "max_new_tokens": 3, "harness": "grace", "protocol": protocol,
        "limit": 100,
        **settings,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"family": "llava", "evaluation": evaluation}))
    commands.evaluate(folder / "run.json", folder / "model", folder / "data", folder / out)
    return read_json(folder / out / "manifest.json")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_number_can_be_made_again_from_its_rows(made, protocol):
    names = [name for asked, name in SCORED if asked == protocol]
    manifest = run(made, names, protocol, out=f"out-{protocol}")
    assert set(manifest["benchmarks"]) == set(names)
    for name in names:
        entry, how = manifest["benchmarks"][name], spec(protocol, name)
        path = made / f"out-{protocol}" / entry["file"]
        rows = read_rows(path)
        assert about(path)["protocol"] == entry["protocol"] == protocol
        assert entry["questions"] == len(rows) and entry["of"] == how.size and entry["limit"] == 100
        columns = zip(rows["extracted"], rows["target"], rows["group"], strict=True)
        assert rows["score"].tolist() == [SCORES[how.score](*row) for row in columns], name
        assert entry["also"] == METRICS[how.metric](rows) and entry["score"] == rows["score"].mean()
        assert rows["sample_id"].is_unique and len(rows) == (
            4 if name == "hallusionbench" and how.size == 951 else ROWS
        )


def test_protocols_that_ask_the_same_share_answers(folder, monkeypatch):
    write(folder, "mme", [OFFICIAL["mme"](i) for i in range(ROWS)])
    asked = []
    real = commands.AnswerLog.add
    monkeypatch.setattr(
        commands.AnswerLog, "add", lambda self, *rest: (asked.append(len(rest[1])), real(self, *rest))[1]
    )
    manifest = run(folder, ["mme"], ["lmms-eval", "llava-1.5", "vlmevalkit"])
    assert manifest["benchmarks"]["mme"]["protocol"] == "lmms-eval"
    assert {p: e["mme"]["protocol"] for p, e in manifest["protocols"].items()} == {
        p: p for p in ("llava-1.5", "vlmevalkit")
    }
    other = read_rows(folder / "out/protocols/vlmevalkit/mme.parquet")
    assert (other["prompt_hash"] != read_rows(folder / "out/mme.parquet")["prompt_hash"]).all()
    assert sum(asked) == 3 * ROWS, "prompt or padding differ"
    asked.clear()
    monkeypatch.setitem(PROTOCOLS["lmms-eval"], "mme", replace(spec("lmms-eval", "mme"), extraction="yes_no"))
    run(folder, ["mme"], ["lmms-eval", "llava-1.5", "vlmevalkit"])
    assert asked == [], "another extraction asks nothing again"


def test_a_question_shows_the_images_that_it_names(folder, monkeypatch):
    import grace.evaluate.runner as runner

    write(folder, "mmmu", [OFFICIAL["mmmu"](i) for i in range(3)])
    seen, real = {}, runner.Runner.answer

    def watched(self, questions, *rest):
        seen.update({question.id: question for question in questions})
        return real(self, questions, *rest)

    monkeypatch.setattr(runner.Runner, "answer", watched)
    run(folder, ["mmmu"], "vlmevalkit")
    two = seen["validation_Art_1"]
    assert two.images == (make_image(1), make_image(9))
    parts = [part.type if part.type == "image" else part.text for part in two.prompt[0].content]
    assert parts.count("image") == 2 and any(
        "or" in part for part in parts[: len(parts) - 1 - parts[::-1].index("image")]
    )
    assert [part.type for part in seen["validation_Art_0"].prompt[0].content].count("image") == 1


@pytest.mark.parametrize(("name", "protocol"), [("gqa", "llava-1.5"), ("mmmu", "grace-release")])
def test_a_text_that_spells_the_image_token_is_asked_even_in_whole_words(folder, name, protocol):
    """The released protocol writes `<image>` for the images that MMMU's questions name."""
    rows = [OFFICIAL[name](i) for i in range(3)]
    rows[1]["question"] = "what is <image> it </s> <eos>"
    write(folder, name, rows)
    assert run(folder, [name], protocol)["benchmarks"][name]["questions"] == 3


def test_only_image_rows_of_seed_bench_and_validation_rows_of_mmmu_are_asked(folder):
    video = {**OFFICIAL["seed-bench"](7), "data_type": "video", "image": [image(i) for i in range(8)]}
    write(folder, "seed-bench", [OFFICIAL["seed-bench"](0), video, OFFICIAL["seed-bench"](2)])
    write(folder, "mmmu", [{**OFFICIAL["mmmu"](0), "id": "dev_Art_1"}, OFFICIAL["mmmu"](1)])
    manifest = run(folder, ["seed-bench", "mmmu"], "lmms-eval")
    assert [manifest["benchmarks"][name]["questions"] for name in ("seed-bench", "mmmu")] == [2, 1]


def damaged(name: str, place: int, **change) -> list[dict]:
    rows = [OFFICIAL[name](i) for i in range(4)]
    rows[place] |= change
    return rows


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("mmstar", damaged("mmstar", 3, index=0), "row 0 has the id of an earlier row"),
        ("textvqa", [{**OFFICIAL["textvqa"](i), "answers": None} for i in range(3)],
            "has no answer, as in splits whose"),
        ("textvqa", [{**OFFICIAL["textvqa"](i), "answers": [""] * 10} for i in range(3)],
            "has no answer, as in splits"),
        ("gqa", damaged("gqa", 1, answer=" "), "row 1 has no answer, as in splits"),
        ("pope", damaged("pope", 1, answer="maybe"), "row 1 has the answer 'maybe', which is neither yes nor no"),
        ("mmbench", damaged("mmbench", 1, answer="D"), "has the answer 'D', which is none of its options A, B, C"),
        ("gqa", damaged("gqa", 2, image={"bytes": b"no image", "path": None}),
            "row 2 has an image that cannot be decoded"),
        ("mme", [OFFICIAL["mme"](0)] * 3, "is a third question about its image"),
        ("gqa", [{"id": "1", "image": image(1)}], "column question is missing"),
        ("mmmu", damaged("mmmu", 0, question="what is <image 3>"), "names image 3, which it does not have"),
        ("mmmu", damaged("mmmu", 1, options="red, blue"), "row 1 has options that are no list: red, blue"),
        ("mmstar", [OFFICIAL["mmstar"](i) | CHOICES for i in range(3)], "has its options apart, which this protocol's"),
        ("seed-bench", [{"question_id": "7", "question": "which", "answer": "B", "image": [image(1)]}],
            "has no options"),
    ],
)  # fmt: skip
def test_one_failure_is_named_and_takes_nothing_with_it(folder, name, rows, said):
    write(folder, name, rows)
    write(folder, "ai2d", [OFFICIAL["ai2d"](i) for i in range(4)])
    protocol = {name: "lmms-eval", "ai2d": "grace-release"}
    with pytest.raises(GraceError, match=said.replace("(", r"\(")):
        run(folder, [name, "ai2d"], protocol)
    assert (folder / "out/ai2d.parquet").is_file() and not (folder / f"out/{name}.parquet").exists()


def test_whatever_is_raised_stops_no_other_benchmark(folder, monkeypatch):
    for name in ("gqa", "ai2d"):
        write(folder, name, [OFFICIAL[name](i) for i in range(3)])
    monkeypatch.setitem(METRICS, "exact_match", METRICS["exact_match"])
    monkeypatch.setitem(SCORES, "trimmed", lambda *row: 1 / 0)
    with pytest.raises(GraceError, match=r"1 of 2 benchmarks failed.*gqa \(llava-1\.5\): ZeroDivisionError"):
        run(folder, ["gqa", "ai2d"], {"gqa": "llava-1.5", "ai2d": "lmms-eval"})
    assert (folder / "out/ai2d.parquet").is_file()


def test_other_rows_than_the_protocol_asks_are_an_error_without_a_limit(folder):
    write(folder, "pope", [OFFICIAL["pope"](i) for i in range(4)])
    with pytest.raises(GraceError, match=r"pope\.parquet: 4 questions, but POPE has 9,000 under this protocol"):
        run(folder, ["pope"], "lmms-eval", limit=None)


def test_an_odd_limit_on_mme_is_no_error_and_is_said(folder):
    write(folder, "mme", [OFFICIAL["mme"](i) for i in range(8)])
    entry = run(folder, ["mme"], "lmms-eval", limit=3)["benchmarks"]["mme"]
    assert (entry["questions"], entry["limit"], entry["of"]) == (3, 3, 2374)


def test_tables_of_vlmevalkit_are_read_images_named_by_index_too(folder):
    rows = [
        {"index": i + shift * 1_000_000, "image": str(i) if shift else encoded(i), "question": "which", "hint": None,
            **CHOICES,
         "answer": "AB"[shift], "category": "c", "l2-category": "l"}
        for i in range(3) for shift in range(2)
    ]  # fmt: skip
    (folder / "data/benchmarks").mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "data/benchmarks/mmbench.tsv", sep="\t", index=False)
    run(folder, ["mmbench"], "vlmevalkit")
    assert read_rows(folder / "out/mmbench.parquet")["image_id"].nunique() == 3


def test_a_question_of_several_polls_counts_in_each(folder):
    """VLMEvalKit's POPE has it once, with the polls' names in a row; its rating takes them apart."""
    polls = ("adversarial,popular,random", "random", "adversarial,popular")
    rows = [
        {"index": i, "image": encoded(i), "question": "is it red", "answer": "Yes", "category": poll}
        for i, poll in enumerate(polls)
    ]
    (folder / "data/benchmarks").mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "data/benchmarks/pope.tsv", sep="\t", index=False)
    assert run(folder, ["pope"], "vlmevalkit")["benchmarks"]["pope"]["questions"] == 6
    found = read_rows(folder / "out/pope.parquet")
    assert sorted(found["group"]) == ["adversarial"] * 2 + ["popular"] * 2 + ["random"] * 2
    assert found["sample_id"].is_unique and found.groupby("prompt_hash")["prediction"].nunique().max() == 1


def test_polls_that_number_their_questions_alike_are_told_apart(folder):
    write(folder, "pope", [{**OFFICIAL["pope"](i), "question_id": str(i % 2)} for i in range(6)])
    assert run(folder, ["pope"], "lmms-eval")["benchmarks"]["pope"]["questions"] == 6


def test_a_submission_that_could_not_be_written_is_written_later_without_asking(folder, monkeypatch):
    table = [{"index": i, "image": encoded(i), "question": "which", "hint": None, **CHOICES} for i in range(3)]
    (folder / "data/benchmarks").mkdir(parents=True)
    pd.DataFrame(table).to_csv(folder / "data/benchmarks/mmbench-test.tsv", sep="\t", index=False)
    with monkeypatch.context() as without, pytest.raises(GraceError, match="needs openpyxl; pip install openpyxl"):
        without.setitem(sys.modules, "openpyxl", None)
        run(folder, ["mmbench-test"], "vlmevalkit")
    monkeypatch.setattr(commands.AnswerLog, "add", lambda *batch: pytest.fail("asked again"))
    run(folder, ["mmbench-test"], "vlmevalkit")
    assert (folder / "out/submissions/vlmevalkit/mmbench-test.xlsx").is_file()


def test_damaged_predictions_of_one_benchmark_stop_no_other(folder):
    for name in ("gqa", "ai2d"):
        write(folder, name, [OFFICIAL[name](i) for i in range(3)])
    protocol = {"gqa": "lmms-eval", "ai2d": "lmms-eval"}
    run(folder, ["gqa"], protocol)
    path = folder / "out/gqa.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(200) + whole[204:])  # its footer is as it was
    with pytest.raises(GraceError, match=r"gqa\.parquet: not readable .*delete it and evaluate again"):
        run(folder, ["gqa", "ai2d"], protocol)
    assert (folder / "out/ai2d.parquet").is_file()


def test_shards_are_read_as_one_file(folder):
    for shard in range(2):
        place = folder / "data/benchmarks/gqa"
        place.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist([OFFICIAL["gqa"](i + 2 * shard) for i in range(2)]), place / f"{shard}.parquet"
        )
    assert run(folder, ["gqa"], "llava-1.5")["benchmarks"]["gqa"]["questions"] == 4


def test_servers_get_their_formats(folder):
    write(folder, "vqav2", [{**OFFICIAL["vqav2"](i), "answers": None} for i in range(3)])
    hidden = [{k: v for k, v in OFFICIAL["vizwiz"](i).items() if k != "answers"} for i in range(3)]
    write(folder, "vizwiz", hidden)
    table = [{"index": i, "image": encoded(i), "question": "which\x0b", "hint": None, **CHOICES} for i in range(3)]
    pd.DataFrame(table).to_csv(folder / "data/benchmarks/mmbench-test.tsv", sep="\t", index=False)
    write(folder, "gqa", [OFFICIAL["gqa"](i) for i in range(3)])
    protocol = {"vqav2": "llava-1.5", "vizwiz": "llava-1.5", "mmbench-test": "vlmevalkit", "gqa": "llava-1.5"}
    manifest = run(folder, list(protocol), protocol)
    assert list(manifest["benchmarks"]) == ["gqa"] and set(manifest["submissions"]["llava-1.5"]) == {"vqav2", "vizwiz"}
    server = folder / "out/submissions"
    vqa, vizwiz = (json.loads((server / f"llava-1.5/{name}.json").read_text()) for name in ("vqav2", "vizwiz"))
    assert [set(row) for row in vqa] == [{"question_id", "answer"}] * 3 and vqa[1]["question_id"] == 1
    assert [row["image"] for row in vizwiz] == [f"VizWiz_val_{i}.jpg" for i in range(3)]
    sheet = pd.read_excel(server / "vlmevalkit/mmbench-test.xlsx", keep_default_na=False)
    assert list(sheet) == ["index", "question", "A", "B", "C", "D", "prediction"] and len(sheet) == 3
    said = read_rows(server / "vlmevalkit/mmbench-test.parquet")["prediction"]
    assert sheet["prediction"].astype(str).tolist() == said.tolist()
