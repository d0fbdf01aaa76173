"""Whole or absent, and never taken for whole when damaged."""

import errno
import json
import os
import pwd

import pytest

from grace import files, hashes
from grace.config import preflight_models
from grace.config.code import CodeIndex
from grace.config.sections import Model
from grace.errors import GraceError
from grace.provenance import accept


def test_a_file_appears_only_when_its_block_ends_well(tmp_path):
    target = tmp_path / "a" / "value.json"
    with pytest.raises(RuntimeError), files.whole_file(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    files.write_json(target, {"b": 1, "a": [2]})
    assert json.loads(target.read_text()) == {"a": [2], "b": 1}
    assert target.read_text().index('"a"') < target.read_text().index('"b"')


def test_a_folder_replaces_the_old_one_only_when_whole(tmp_path):
    target = tmp_path / "model"
    with files.whole_folder(target, kind="first") as folder:
        (folder / "x").write_text("1")
    with pytest.raises(RuntimeError), files.whole_folder(target) as folder:
        (folder / "x").write_text("2")
        raise RuntimeError
    assert (target / "x").read_text() == "1"
    assert files.check_manifest(target)["kind"] == "first"
    with files.whole_folder(target, kind="second") as folder:
        (folder / "y").write_text("3")
    assert not (target / "x").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(GraceError, match=r"value.json: could not be written \(No space left on device\); free space"):
        files.write_json(tmp_path / "value.json", {})
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path):
    with files.whole_folder(tmp_path / "model") as folder:
        for name in ("a", "b", "c"):
            (folder / name).write_text(name)
    (tmp_path / "model/a").write_text("A")
    (tmp_path / "model/b").unlink()
    with pytest.raises(GraceError, match="a differs, b is missing"):
        files.check_manifest(tmp_path / "model")


def test_a_damaged_manifest_is_written_again(tmp_path):
    (tmp_path / "a").write_text("a")
    files.write_manifest(tmp_path)
    whole = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(whole.replace(b"a", b"\xff", 1))
    files.write_manifest(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == whole


@pytest.mark.parametrize("text, reason", [(None, "no such file"), ("{", "not valid JSON")])
def test_unreadable_json(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(GraceError, match=reason):
        files.read_json(tmp_path / "x.json")


def test_a_user_without_a_name_and_a_home_does_without_a_memory(tmp_path, monkeypatch):
    """As in a container that runs under any number, which the system knows nothing of."""
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    monkeypatch.setattr(accept, "git_or_none", lambda *words: None)
    monkeypatch.setattr(hashes, "REMEMBERED_FROM", 10)
    monkeypatch.setattr(hashes, "SETTLED_S", -1.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(b"0123456789")
    assert hashes.known_sha256("weights") == hashes.sha256("weights")
    assert CodeIndex().fingerprint("pack")["code"]
    assert preflight_models._cached(Model(pretrained="a/b")) is None
    assert accept._who() == f"user {os.getuid()}"
    assert os.listdir() == ["weights"]


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "notes"))
    monkeypatch.setattr(hashes, "REMEMBERED_FROM", 10)
    monkeypatch.setattr(hashes, "SETTLED_S", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"0123456789")
    state, right = path.stat(), hashes.sha256(path)
    read = []
    monkeypatch.setattr(hashes, "sha256", lambda path, real=hashes.sha256: read.append(path) or real(path))
    assert [hashes.known_sha256(path) for _ in range(3)] == [right] * 3 and len(read) == 1
    path.write_bytes(b"0123456780")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # size and time as before
    assert hashes.known_sha256(path) != right
