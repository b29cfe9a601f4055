"""Builds of C files: whole or not at all, this user's, and made again where they are not."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from leangpt.system import c_library

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C file that answers 42; its build goes to tmp_path/cache."""
    monkeypatch.setenv("LEANGPT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def builds(tmp_path):
    return sorted((tmp_path / "cache").iterdir())


def answer(source):
    """What a process of its own gets from the library: a bad one would take this one along."""
    code = (
        "import pathlib, sys; from leangpt.system import c_library;"
        "library = c_library.load(pathlib.Path(sys.argv[1])); print(library and library.answer())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or f"status {done.returncode}: {done.stderr}"


def test_a_build_is_kept_and_used_again(source, tmp_path, monkeypatch):
    assert answer(source) == "42"
    (path,) = builds(tmp_path)
    assert path.suffix == ".so" and not path.stat().st_mode & 0o022
    monkeypatch.setattr(c_library, "build", None)  # would fail if called
    assert c_library.load(source).answer() == 42


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_build_cut_short_is_made_again(source, tmp_path, part):
    """Mapped as it is, it would end the process with SIGBUS or SIGSEGV, at every start."""
    answer(source)
    (path,) = builds(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert answer(source) == "42"
    assert builds(tmp_path) == [path] and len(path.read_bytes()) == len(whole)


def test_a_damaged_build_is_made_again(source, tmp_path):
    answer(source)
    (path,) = builds(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 3] ^= 4
    path.write_bytes(damaged)
    assert answer(source) == "42" and path.read_bytes() != damaged


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root to give files away")
def test_another_users_build_is_not_run(source, tmp_path):
    answer(source)
    (path,) = builds(tmp_path)
    os.chown(path, 12345, -1)
    assert not c_library.usable(path, source)
    assert answer(source) == "42" and path.stat().st_uid == 0
    os.chown(path, 12345, -1)
    os.chown(source, 12345, -1)  # whose code runs anyway
    assert c_library.usable(path, source)


def test_a_build_that_others_can_write_is_not_run(source, tmp_path):
    answer(source)
    (path,) = builds(tmp_path)
    path.chmod(0o777)
    assert answer(source) == "42" and not path.stat().st_mode & 0o022


@pytest.mark.parametrize("cc", ["exit 1", "kill -9 $$", 'for a; do echo x > "$a"; done; exit 1'])
def test_a_compiler_that_dies_leaves_nothing(source, tmp_path, monkeypatch, cc):
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{cc}\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert c_library.load(source) is None
    assert builds(tmp_path) == []


def test_a_headers_change_is_another_build(source, tmp_path):
    header = tmp_path / "include" / "answer.h"
    header.parent.mkdir()
    source.write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    for number in (1, 2):
        header.write_text(f"#define ANSWER {number}\n")
        assert c_library.load(source, headers=[header]).answer() == number
    assert len(builds(tmp_path)) == 2
