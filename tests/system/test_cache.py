"""One place for everything that can be made again."""

from pathlib import Path

import pytest

from leangpt.system import cache


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """The package outside a checkout, the environment saying nothing."""
    for name in ("LEANGPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache, "ROOT", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_this_checkout_has_its_own():
    assert cache.runs_from_checkout()


def test_the_order_of_places(nowhere, monkeypatch):
    assert cache.cache_folder() == nowhere / "home" / ".cache" / "leangpt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "xdg"))
    assert cache.cache_folder() == nowhere / "xdg" / "leangpt"
    (nowhere / "pyproject.toml").write_text('[project]\nname = "leangpt"\n')
    assert cache.cache_folder() == nowhere / ".cache"
    monkeypatch.setenv("LEANGPT_CACHE", "~/own")
    assert cache.cache_folder() == Path(nowhere / "home" / "own")


@pytest.mark.parametrize(
    "content", ['[project]\nname = "other"\n', "[tool]\n", "not = toml = ", "\xff"]
)
def test_somebody_elses_project_is_no_checkout(nowhere, content):
    (nowhere / "pyproject.toml").write_text(content, encoding="latin-1")
    assert not cache.runs_from_checkout()
