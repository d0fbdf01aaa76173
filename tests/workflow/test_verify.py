"""Whether files are still what was made, and who may write them."""

import multiprocessing
import time
from pathlib import Path

import pytest

from grace.cluster.lock import lock_path, one_writer
from grace.errors import GraceError
from grace.files import check_manifest, whole_folder, write_json, write_manifest
from grace.provenance.verify import check, verify


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Folders with manifests, and single files that no record speaks of."""
    folder = tmp_path / "results" / "small"
    for name in ("data", "students/grace/int4/seed0/model"):
        with whole_folder(folder / name) as part:
            (part / "deep").mkdir()
            (part / "a.txt").write_text(f"a of {name}")
            (part / "deep" / "b.txt").write_text("b")
    write_json(folder / "metrics.json", {"accuracy": 1.0})
    return folder


def test_a_whole_tree_is_verified(results: Path, capsys: pytest.CaptureFixture) -> None:
    (results / "logs").mkdir()
    (results / "logs/run.log").write_text("words")
    assert verify(results).manifests == 2
    said = capsys.readouterr().out
    assert "6 files in 2 folders are whole" in said and "1 single files have no record" in said
    assert verify(results / "students").manifests == 1


def test_every_wrong_file_is_named(results: Path) -> None:
    model = results / "students/grace/int4/seed0/model"
    (results / "data/a.txt").write_text("A of data")
    (results / "data/deep/b.txt").unlink()
    (results / "data/c.txt").write_text("new")
    (model.parent / ".model.12-abc.part").mkdir()
    (model.parent / ".model.12-abc.part/a.txt").write_text("half")
    with pytest.raises(GraceError, match=r"4 of 8 files are not as recorded; .*dvc checkout") as error:
        verify(results)
    assert str(error.value).splitlines()[1:] == [
        "  results/small/data/a.txt: differs from results/small/data/manifest.json",
        "  results/small/data/deep/b.txt: missing, listed in results/small/data/manifest.json",
        "  results/small/data/c.txt: listed nowhere",
        "  results/small/students/grace/int4/seed0/.model.12-abc.part/a.txt: left by a killed job; delete it",
    ]


def test_predictions_are_held_against_their_benchmarks(results: Path) -> None:
    """Their manifest says more of each file than of other folders', in the same shape."""
    folder = results / "students/grace/int4/seed0/predictions"
    folder.mkdir()
    (folder / "colour.parquet").write_bytes(b"answers")
    write_manifest(folder, benchmarks={"colour": {"file": "colour.parquet", "score": 1.0}})
    write_manifest(results / "data", benchmarks=["colour"])
    assert check(results).wrong == []
    (folder / "colour.parquet").write_bytes(b"others")
    assert [line.split(": ")[1][:12] for line in check(results).wrong] == ["differs from"]


def test_what_cannot_be_verified_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="not below a results folder"):
        verify(tmp_path)
    (tmp_path / "results/empty").mkdir(parents=True)
    with pytest.raises(GraceError, match="holds no results; build the experiment"):
        verify(tmp_path / "results/empty")
    with pytest.raises(GraceError, match="no such folder"):
        verify(tmp_path / "results/none")


def _write_again_and_again(target: Path, word: str, times: int) -> None:
    for number in range(times):
        with whole_folder(target, word=word) as part:
            for index in range(20):
                (part / f"{index}.txt").write_text(f"{word} {number}")


def test_two_writers_of_a_folder_leave_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    writers = [multiprocessing.Process(target=_write_again_and_again, args=(target, word, 60)) for word in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    word = check_manifest(target)["word"]
    assert {path.read_text() for path in target.glob("*.txt")} == {f"{word} 59"}
    assert list(tmp_path.iterdir()) == [target], "nothing half-written stays"


def _hold(target: Path, go) -> None:
    with one_writer(target):
        (target.parent / "held").touch()
        go.wait()


def test_a_second_writer_waits_for_the_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target, go = tmp_path / "checkpoints", multiprocessing.Event()
    first = multiprocessing.Process(target=_hold, args=(target, go))
    first.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(GraceError, match=rf"is being written by process {first.pid} on "), one_writer(target, 0.2):
        pass
    assert f"waiting for process {first.pid}" in capsys.readouterr().err
    first.kill()  # a lock ends with its holder, however that ends
    first.join()
    with one_writer(target) as waited:
        assert not waited and lock_path(target).is_file()
    assert not lock_path(target).exists()
