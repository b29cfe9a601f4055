"""train.py in several processes, whichever way they share it: the losses of one process."""

import itertools

import pytest
import torch
from several_processes import train_in_processes
from tiny_run import arguments, determined

import train

pytestmark = pytest.mark.slow

CAMPAIGN = pytest.mark.campaign
VARIANTS = (
    pytest.param("adam", marks=CAMPAIGN),
    pytest.param("adamsn8", marks=CAMPAIGN),
    pytest.param("adafactor", marks=CAMPAIGN),
    pytest.param("muonsn8", marks=CAMPAIGN),
    "muonsn4",
)
SHAPE = ["--n_embd=32", "--max_iters=20", "--eval_interval=10"]
INSIDE = "--optimizer_options=fused_backward=True"


def settings_of(variant):
    """Flags of the runs that a variant is compared in: accumulation 1 and 3, updates inside
    backward; odd numbers of sequences for two processes to share."""
    runs = [
        ["--gradient_accumulation_steps=1", "--batch_size=3"],
        ["--gradient_accumulation_steps=3"],
    ]
    if variant != "adam":
        runs.append(["--gradient_accumulation_steps=1", INSIDE])
    return [[*SHAPE, f"--optimizer_variant={variant}", *flags] for flags in runs]


def numbers(out_dir):
    return [[float(value or 0) for value in row] for row in determined(out_dir)]


def compare(tmp_path, runs, processes, *flags, within=1e-3):
    """Each of `runs` in one process, and in several with `flags` as well: metrics.csv agrees."""
    compare_all(tmp_path, [(run, flags) for run in runs], processes, within)


def compare_all(tmp_path, pairs, processes, within=1e-3):
    """The same for pairs of a run's flags and those that several processes have besides. All runs
    of several follow each other in the same processes, which take long to start."""
    torch.set_num_threads(1)
    for index, (run, _) in enumerate(pairs):
        train.main(arguments(tmp_path, f"one-{index}", *run))
    several = [
        arguments(tmp_path, f"several-{index}", *run, *flags)
        for index, (run, flags) in enumerate(pairs)
    ]
    train_in_processes(processes, *several)
    for index, (run, _) in enumerate(pairs):
        rows = itertools.zip_longest(
            *(numbers(tmp_path / f"{side}-{index}") for side in ("one", "several"))
        )
        for one, other in rows:
            assert one == pytest.approx(other, rel=within, abs=within), run


@pytest.mark.parametrize("variant", VARIANTS)
def test_sharded_weights_and_sequences_in_pieces(tmp_path, variant):
    """Weights in shards; then sequences in pieces, of 17 tokens, which do not fall into four: with
    shards too where updates are inside backward, else with all weights everywhere."""
    runs = settings_of(variant)
    pairs = [(run, ("--parallel=fsdp",)) for run in runs]
    for index, run in enumerate(runs):
        parallel = "fsdp" if index == 2 else "ddp"
        flags = (f"--parallel={parallel}", "--context_parallel=2")
        pairs.append(([*run, "--block_size=17", "--position=rope", "--q_chunk=9"], flags))
    compare_all(tmp_path, pairs, 2)


def test_whole_weights(tmp_path):
    runs = [
        [*SHAPE, "--optimizer_variant=muonsn4", "--gradient_accumulation_steps=3"],
        [*SHAPE, "--attention_policy=grouped", "--gradient_accumulation_steps=2"],
    ]
    compare(tmp_path, runs, 2, "--parallel=ddp")


@pytest.mark.parametrize(
    "flags",
    (
        ["--attention_policy=grouped"],
        pytest.param(["--attention_policy=recompute"], marks=CAMPAIGN),
    ),
)
def test_four_processes_share_weights_and_sequences(tmp_path, flags):
    """Two shares of the batch, each on two processes; tied heads, few key/value heads, layers that
    keep their inputs alone; an accumulation that the processes do not divide."""
    few = ["--n_embd=32", "--max_iters=6", "--eval_interval=3", "--checkpoint_layers=True"]
    runs = [
        [*few, *flags, "--n_head=4", "--q_chunk=8", f"--optimizer_variant={variant}", *steps]
        for variant, steps in (
            ("muonsn8", ["--gradient_accumulation_steps=3"]),
            ("adamsn8", ["--gradient_accumulation_steps=1", INSIDE]),
        )
    ]
    compare(tmp_path, runs, 4, "--parallel=fsdp", "--context_parallel=2")
