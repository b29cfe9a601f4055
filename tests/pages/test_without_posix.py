"""The pages where Windows and macOS lack what Linux has: modules, and names in os and signal."""

import subprocess
import sys

import pytest
from tiny_run import ROOT, arguments

# a script of ours in a process where those are gone; other people's may need them, and come first
WITHOUT = """
import os, platform, runpy, signal, sys
import jinja2, matplotlib.pyplot, multiprocessing.pool, psutil, torch, torch._dynamo, tqdm
import torch.distributed

for name in "fcntl grp pty pwd readline resource termios tty".split():
    sys.modules[name] = None
for name in "getuid openpty sched_getaffinity sysconf uname".split():
    delattr(os, name)
for name in "ITIMER_PROF SIGHUP SIGPIPE setitimer".split():
    delattr(signal, name)
platform.system = lambda: "Windows"
sys.path[0], sys.argv = os.getcwd(), sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without(*words):
    """What a script prints there."""
    command = [sys.executable, "-c", WITHOUT, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes away what Linux has")
def test_a_run_from_its_text_to_a_sample(tmp_path):
    flags = arguments(tmp_path, "run", "--max_iters=4", "--eval_interval=2")
    assert "predicted" in without("train.py", *flags)
    assert "resuming" in without("train.py", *flags, "--init_from=resume", "--max_iters=6")
    assert "tokens/s" in without("sample.py", f"--out_dir={tmp_path}/run", "--max_new_tokens=8")
    assert "picture in" in without("compare.py", tmp_path / "run", f"--out={tmp_path}/a.png")


@pytest.mark.parametrize(
    "words, says",
    [
        (["bench.py", "--seq=16", "--runs=1", "--d_model=16", "--policy=cache"], "ok"),
        (["plan.py", "--memory=24GB", "--goal=longest", "--n_layer=2", "--n_head=4"], "train.py"),
        (["data/source_code/prepare.py", "--help"], "--workers"),
    ],
)
@pytest.mark.slow
def test_the_other_pages(words, says):
    assert says in without(*words)
