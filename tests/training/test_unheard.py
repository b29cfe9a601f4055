"""Where nobody can read what a run says: what it has learned is kept, and its status tells."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from tiny_run import ROOT, arguments, determined

from leangpt.runs.checkpoint import LAST

pty = pytest.importorskip("pty")
RUN = ("--max_iters=40", "--eval_interval=1000")


def command(tmp_path, name, *more):
    return [sys.executable, "train.py", *arguments(tmp_path, name, *RUN, *more)]


def iteration(folder):
    return torch.load(folder / LAST, weights_only=True)["iter_num"]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk to be had")
@pytest.mark.parametrize("more", [(), ("--eval_only=True",)])
def test_a_full_disk_under_the_log_ends_no_run_but_is_told(tmp_path, more):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(tmp_path, "a", *more), cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    note, error = done.stderr.splitlines()
    assert note == (
        "note: standard output takes no more (No space left on device): the run goes on without"
    )
    assert error.startswith("error: the run is done, but not all it said is written: No space")
    if not more:
        assert iteration(tmp_path / "a") == 40
        assert len(determined(tmp_path / "a")) == 42  # 40 iterations, evaluations before and after


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_a_run_as_a_signal_does(tmp_path):
    words = command(tmp_path, "a", "--max_iters=1000000")
    run = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in run.stdout:
        if line.startswith("iter 20:"):
            break
    run.stdout.close()
    said = run.stderr.read()
    assert run.wait(60) == 128 + signal.SIGPIPE
    assert said == ""
    reached = iteration(tmp_path / "a")
    assert 20 < reached < 1000000
    rows = determined(tmp_path / "a")
    assert int(rows[-1][0]) == reached - 1  # each iteration has its row


@pytest.mark.slow
def test_a_run_that_was_told_to_outlive_its_terminal_does(tmp_path):
    ours, its = pty.openpty()
    run = subprocess.Popen(
        command(tmp_path, "a"),
        cwd=ROOT,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    os.close(its)
    os.close(ours)  # what it writes from here on is refused: EIO
    assert run.wait(120) == 0
    assert iteration(tmp_path / "a") == 40
