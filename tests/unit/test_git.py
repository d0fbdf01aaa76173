"""git, asked about a folder, and a merge that it refuses."""

import subprocess
from pathlib import Path

import pytest

from grace import git as module
from grace.errors import GraceError
from grace.git import GitRefused, git, git_bytes, git_or_none
from grace.provenance.merge import merge

IDENTITY = ("-c", "user.name=A Test", "-c", "user.email=test@example.org")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit of one file."""
    git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "file").write_bytes(b"\xff one\n\n")
    _commit(tmp_path, "first")
    return tmp_path


def _commit(repository: Path, message: str) -> None:
    git(repository, "add", "-A")
    git(repository, *IDENTITY, "commit", "-q", "-m", message)


def test_what_git_prints(repository: Path) -> None:
    assert git(repository, "log", "--format=%s%n%n") == "first"
    assert git_or_none(repository, "log", "--format=%s%n%n") == "first"
    assert git_bytes(repository, "show", "HEAD:file") == b"\xff one\n\n"


def test_a_refusal_says_where_what_and_why(repository: Path) -> None:
    with pytest.raises(GitRefused, match=rf"^{repository}: `git show HEAD:none` failed \(fatal: .*none"):
        git(repository, "show", "HEAD:none")
    assert git_or_none(repository, "show", "HEAD:none") is None
    assert git_or_none(repository / "nowhere", "status") is None


def test_a_machine_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(GraceError, match=r"^git does not run .*install it") as said:
        git(repository, "status")
    assert not isinstance(said.value, GitRefused)
    assert git_or_none(repository, "status") is None


def test_nobody_waits_for_ever_for_an_answer_that_may_be_missing(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    assert git_or_none(repository, "-c", "alias.wait=!exec sleep 5", "wait") is None


def test_a_merge_that_git_refuses_for_no_conflict_stops(repository: Path) -> None:
    git(repository, "checkout", "-q", "-b", "other")
    (repository / "new").write_text("theirs")
    _commit(repository, "second")
    git(repository, "checkout", "-q", "main")
    (repository / "new").write_text("in nobody's commit")
    with pytest.raises(GitRefused, match=r"`git merge .* other` failed .*would be overwritten"):
        merge("other", repository)
    assert (repository / "new").read_text() == "in nobody's commit"
    assert subprocess.run(["git", "-C", repository, "rev-parse", "-q", "--verify", "MERGE_HEAD"]).returncode
