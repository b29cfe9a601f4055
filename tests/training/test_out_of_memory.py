"""Where memory ends: one line, and every setting that it names lowers the peak that is measured."""

import contextlib
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_run import ROOT, arguments, run_script

import train
from leangpt.memory.search import Budget, predict
from leangpt.memory.units import parse_bytes
from leangpt.system.errors import UserError
from leangpt.training import out_of_memory, planning
from leangpt.training.out_of_memory import advise_oom, instead

# train.py in a process of its own that may take so many bytes of addresses beyond those it has
LIMITED = """
import resource, sys
from pathlib import Path
import train
from leangpt.system.errors import exit_cleanly
room = int(sys.argv.pop(1))
has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (has + room,) * 2)
exit_cleanly(train.main)
"""
QUICK = ["--max_iters=4", "--eval_interval=0", "--eval_iters=1", "--overwrite=True"]


def limited(room, *words, **environment):
    """The line on standard error of a train.py that is given `room` bytes, and its exit status."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = run_script("-c", LIMITED, str(room), *words, env=environment)
    return done.stderr, done.returncode


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits addresses as Linux does")
@pytest.mark.parametrize(
    "words, says",
    [
        (
            ["--n_embd=1048576", "--n_layer=1"],  # weights of 13 TB
            "weights and optimizer state of a model of n_layer=1, n_embd=1048576 do not fit",
        ),
        (
            ["--batch_size=1024", "--n_embd=64"],
            r"this run takes .* MB of .* MB at hand at its fullest \(.*\); --.* would take ",
        ),
    ],
)
def test_memory_that_ends_is_one_line_and_what_would_help(tmp_path, words, says):
    """In a process of its own: where the system promises more than it has, it would be killed."""
    words = arguments(tmp_path, "run", *QUICK, *words, "--memory=ignore")
    error, status = limited(200 * 2**20, *words)
    assert status == 1 and error.count("\n") == 1
    assert re.match(f"error: out of memory: {says}", error), error


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_too(tmp_path):
    words = [*QUICK, "--batch_size=1024", "--block_size=512", "--n_embd=256", "--compile=False"]
    words = arguments(tmp_path, "run", *words, "--device=cuda", "--memory=ignore")
    share = {"PYTORCH_CUDA_ALLOC_CONF": "per_process_memory_fraction:0.02"}
    error, status = limited(2**45, *words, **share)
    assert status == 1 and error.count("\n") == 1
    assert re.match("error: out of memory: this run takes .*; --batch_size=", error), error


def wish_of(tmp_path, *words, fixed=()):
    """The Wish of a run on the tiny data set."""
    settings, given = train.parse_config(train.Settings, arguments(tmp_path, "run", *QUICK, *words))
    settings.learning_rate = None
    config = planning.run_config(train.GPTConfig, settings, given, 30)
    options = train.parse_options(settings.optimizer_options)
    return planning.wish_of(settings, fixed, config, options, torch.float32, "cpu")


def measured(tmp_path, capsys, *words):
    """Bytes at the peak of a step, as the log has them."""
    capsys.readouterr()
    train.main(arguments(tmp_path, "run", *QUICK, *words))
    return parse_bytes(re.search(r"measured (.*?) \(", capsys.readouterr().out)[1])


BATCH = ("--batch_size", "--gradient_accumulation")
RUNS = {
    "activations": "n_embd=64 block_size=256 batch_size=8 n_layer=4",
    "weights": "n_embd=256 block_size=64 batch_size=1 n_layer=4",
    "few tokens": "n_embd=256 block_size=64 batch_size=2 optimizer_variant=muonsn8",
    "many tokens": "n_embd=64 block_size=1024 batch_size=1 attention_policy=recompute",
    "by tiles": "n_embd=64 block_size=1024 batch_size=1 checkpoint_layers=True",
}
RUNS = {name: [f"--{word}" for word in words.split()] for name, words in RUNS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.8, 0.4])
@pytest.mark.parametrize("name", RUNS)
def test_what_is_named_lowers_the_measured_peak_each_for_itself(
    tmp_path, capsys, monkeypatch, name, share
):
    """On a CPU, where several ways to save on a GPU save nothing."""
    monkeypatch.setattr(out_of_memory, "LESS", share)
    flags = RUNS[name]
    said = instead(wish_of(tmp_path, *flags), None)
    match = re.search("; (--.*) would take (.*)", said)
    if match is None:
        assert "no plan fits" in said
        return
    words = match[1].split()
    flags = [*flags, "--learning_rate=None"]
    peak = measured(tmp_path, capsys, *flags, *words)
    assert peak == pytest.approx(parse_bytes(match[2]), rel=0.1)
    assert peak <= 1.03 * share * measured(tmp_path, capsys, *flags)
    for word in words:
        batch = word.startswith(BATCH)  # both of them are one change
        rest = [w for w in words if w != word and not (batch and w.startswith(BATCH))]
        with contextlib.suppress(UserError):  # adam does not update inside backward, say
            assert measured(tmp_path, capsys, *flags, *rest) > 1.005 * peak, word


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_named_that_is_so_already(tmp_path, name):
    said = instead(wish_of(tmp_path, *RUNS[name]), None)
    assert not {*said.split()} & {*RUNS[name]}, said


def test_flags_of_the_command_line_are_kept_where_that_is_possible(tmp_path):
    wish = wish_of(tmp_path, *RUNS["weights"], fixed=("optimizer_variant",))
    assert "--optimizer_variant" not in instead(wish, None)
    assert "--optimizer_variant" in instead(wish_of(tmp_path, *RUNS["weights"]), None)


def test_where_nothing_would_fit_that_is_said(tmp_path):
    said = instead(wish_of(tmp_path, *RUNS["weights"]), 1000)
    assert "of 1 KB at hand" in said and "no plan fits 1 KB: the least that this model" in said


@pytest.mark.parametrize(
    "batch, count, says",
    [(8, 5, "--batch_size=4 --gradient_accumulation_steps=10"), (1, 5, "--block_size=16")],
)
def test_what_was_not_predicted_is_not_calculated(batch, count, says):
    """Shares of weights, pieces of sequences, optimizers that are not ours."""
    settings = train.Settings(batch_size=batch, gradient_accumulation_steps=count, block_size=16)
    line = advise_oom(settings, None, planning.Fitted(settings), config=object())
    assert "nothing was predicted of this run" in line and says in line


def test_on_a_gpu_what_others_have_taken_since_counts(tmp_path, monkeypatch):
    free, reserved = 40_000_000, 20_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    wish = wish_of(tmp_path, *RUNS["activations"])
    settings, _ = train.parse_config(
        train.Settings, arguments(tmp_path, "run", *QUICK, *RUNS["activations"])
    )
    runtime = SimpleNamespace(
        dtype=torch.float32, device_type="cuda", world_size=1, device=torch.device("cuda")
    )
    config, plan = wish.asked.config, predict(wish.asked, wish, Budget(10**9))
    fitted = planning.Fitted(settings, plan, 10**10)
    line = advise_oom(settings, runtime, fitted, config)
    assert "of 660 MB at hand" in line  # 600 of them CUDA's own
