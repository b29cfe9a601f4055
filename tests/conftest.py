"""Tests import from the repository's root and stay on two threads each."""

import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine spinning costs minutes

# a shell starts `pytest &` with Ctrl-C ignored, nohup one with SIGHUP ignored, and what the tests
# start would ignore them too
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def let_the_interpreter_index():
    """Triton 3.6 holds a scalar as an array of one number, which NumPy from 2.4 on does not take
    for an index any more: loops over a range fail in the interpreter. Here it is taken out first.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_index


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    let_the_interpreter_index()


@pytest.fixture
def repository(tmp_path):
    """A git repository of one commit that holds code.py, kernel.c and, in a folder, notes.txt."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path / "repository"
    (folder / "docs").mkdir(parents=True)
    (folder / "code.py").write_text("1\n")
    (folder / "kernel.c").write_text("1;\n")
    (folder / "docs" / "notes.txt").write_text("2\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init"], ["add", "."], [*author, "commit", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def letters():
    """600 tokens of 11 kinds, for the searches' tiny models."""
    import torch

    from experiments.optimizers.many_runs import Text

    tokens = torch.randint(11, (600,), generator=torch.Generator().manual_seed(0))
    return Text(tokens[:500], tokens[500:], 11, "none")
