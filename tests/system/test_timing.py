"""What a measured row says of itself."""

import shutil

import pytest

from leangpt.system import timing
from leangpt.system.timing import quartiles


@pytest.fixture
def commit(monkeypatch, repository):
    """commit_id in a repository that holds the files; what a run's first call found is cached."""
    monkeypatch.delenv("LEANGPT_COMMIT", raising=False)
    monkeypatch.setattr(timing, "ROOT", repository)
    return timing.commit_id.__wrapped__


def test_the_commit_has_a_mark_where_python_or_c_files_differ(commit, repository):
    clean = commit()
    assert len(clean) >= 4 and int(clean, 16) >= 0
    for name, mark in (("docs/notes.txt", ""), ("code.py", "+"), ("kernel.c", "+")):
        before = (repository / name).read_text()
        (repository / name).write_text("edited\n")
        assert commit() == clean + mark, name
        (repository / name).write_text(before)
    (repository / "new.py").write_text("not of the commit, nor imported by what is\n")
    assert commit() == clean


def test_the_environment_has_precedence(commit, monkeypatch):
    monkeypatch.setenv("LEANGPT_COMMIT", "given")
    assert commit() == "given"


def test_a_copy_inside_another_repository_has_no_commit(commit, monkeypatch, repository):
    """An installed package in a virtual environment in somebody's project, say."""
    installed = repository / "venv" / "site-packages"
    shutil.copytree(repository / "docs", installed / "leangpt")
    monkeypatch.setattr(timing, "ROOT", installed)
    assert commit() == ""


def test_without_a_repository_or_git_there_is_none(commit, monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(timing, "ROOT", tmp_path / "copy")
    assert commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == ""


def test_quartiles():
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0)
