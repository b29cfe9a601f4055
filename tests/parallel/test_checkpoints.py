"""Checkpoints of sharded runs: resumed by other numbers of processes, sampled, and what a killed
process leaves."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from several_processes import train_in_processes
from tiny_run import ROOT, arguments, determined, run_script
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from two_processes import free_port

import train
from leangpt.parallel.shards import CONTENTS, PREFIX, read_tensors, reader_of
from leangpt.runs.checkpoint import BEST, LAST, load_checkpoint
from leangpt.system.errors import UserError

SHAPE = [
    "--n_embd=32",
    "--position=rope",
    "--checkpoint_layers=True",
    "--gradient_accumulation_steps=2",
    "--eval_interval=4",
    "--lr_decay_iters=16",
]
VARIANTS = ("adam", "adamsn8", "adafactor", "muonsn8", "muonsn4")


def numbers(out_dir):
    return [[float(value or 0) for value in row] for row in determined(out_dir)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variants", [VARIANTS[::2], pytest.param(VARIANTS[1::2], marks=pytest.mark.campaign)]
)
def test_a_run_goes_on_in_any_number_of_processes_and_any_way(tmp_path, variants):
    """Four iterations each: two processes sharded, three with sequences in pieces, two that hold
    everything, one; the losses are those of one process all along."""
    torch.set_num_threads(1)

    def flags(variant, iterations, *more):
        run = [*SHAPE, f"--optimizer_variant={variant}", f"--max_iters={iterations}"]
        return arguments(tmp_path, variant, *run, *more)

    resume = "--init_from=resume"
    train_in_processes(2, *(flags(v, 4, "--parallel=fsdp") for v in variants))
    pieces = ("--parallel=fsdp", "--context_parallel=3", resume)
    train_in_processes(3, *(flags(v, 8, *pieces) for v in variants))
    for variant in variants:
        folders = {path.name for path in (tmp_path / variant).glob(f"{PREFIX}*")}
        assert 1 <= len(folders) <= 2  # the best's and the last's
    train_in_processes(2, *(flags(v, 12, "--parallel=ddp", resume) for v in variants))
    for variant in variants:
        train.main(flags(variant, 16, resume))
        whole = arguments(
            tmp_path, "whole", *SHAPE, f"--optimizer_variant={variant}", "--max_iters=16"
        )
        train.main([*whole, "--overwrite=True"])
        rows = numbers(tmp_path / variant), numbers(tmp_path / "whole")
        assert len(rows[0]) == len(rows[1])
        for one, other in zip(*rows):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-3), variant
        assert not list((tmp_path / variant).glob(f"{PREFIX}*"))  # nobody names one any more


@pytest.mark.slow
def test_a_sharded_checkpoint_is_sampled_and_becomes_one_file(tmp_path):
    run = [*SHAPE, "--optimizer_variant=muonsn8", "--max_iters=4", "--parallel=fsdp"]
    train_in_processes(2, arguments(tmp_path, "run", *run))
    folder = tmp_path / "run"
    assert load_checkpoint(folder / BEST)["iter_num"] == 4
    assert torch.load(folder / LAST, weights_only=True)["model"] == {}
    sample = [
        "sample.py",
        f"--out_dir={folder}",
        "--device=cpu",
        "--num_samples=1",
        "--max_new_tokens=20",
        "--temperature=0",
    ]
    before = run_script(*sample)
    assert before.returncode == 0, before.stderr
    joined = run_script("-m", "leangpt.runs.checkpoint", str(folder))
    assert joined.returncode == 0, joined.stderr
    assert not list(folder.glob(f"{PREFIX}*"))
    whole = torch.load(folder / BEST, weights_only=True)
    assert "lm_head.weight" in whole["model"] and "shards" not in whole
    after = run_script(*sample)
    text = [result.stdout.split("tokens/s")[0][:40] for result in (before, after)]
    assert text[0] == text[1]


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_one_line_and_the_other_checkpoint_is_whole(tmp_path):
    run = [*SHAPE, "--optimizer_variant=muonsn8", "--max_iters=4", "--parallel=fsdp"]
    train_in_processes(2, arguments(tmp_path, "run", *run))
    folder = tmp_path / "run"
    places = [torch.load(folder / name, weights_only=True)["shards"] for name in (BEST, LAST)]
    assert places[0]["folder"] != places[1]["folder"]
    last = folder / places[1]["folder"]
    assert (
        {path.name for path in last.iterdir()}
        == set(places[1]["sha256"])
        == {CONTENTS, "__0_0.distcp", "__1_0.distcp"}
    )
    for path in sorted(last.iterdir()):
        whole = path.read_bytes()
        for at in (len(whole) // 3, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(UserError, match="its checksum differs; .*ckpt.pt is whole"):
                load_checkpoint(folder / LAST)
        path.write_bytes(whole[:-1])
        with pytest.raises(UserError, match="should have [0-9]+ bytes, and is [0-9]+"):
            load_checkpoint(folder / LAST)
        path.write_bytes(whole)
    # saved before there were checksums: it means the same
    checkpoint = load_checkpoint(folder / LAST)
    old = torch.load(folder / LAST, weights_only=True)
    del old["shards"]["sha256"]
    torch.save(old, folder / LAST)
    again = load_checkpoint(folder / LAST)
    for name, weight in checkpoint["model"].items():
        assert torch.equal(weight, again["model"][name])


@pytest.mark.parametrize(
    "shards",
    [
        {},
        {"folder": 3, "files": {}},
        {"folder": "shards-x", "files": {"a": 1}},
        {"folder": "shards-x", "files": [1]},
        {"folder": "shards-x", "files": {}},
        {"folder": "shards-x", "files": {1: 1}, "sha256": 3},
    ],
)
def test_shards_of_a_wrong_type_are_one_line(tmp_path, shards):
    checkpoint = {"model": {}, "model_args": {}, "iter_num": 1, "shards": shards}
    torch.save(checkpoint, tmp_path / LAST)
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / LAST)


def test_no_more_memory_is_asked_for_than_there_are_bytes(tmp_path):
    """A table of contents of a few bytes may announce tensors of any size."""
    properties = TensorProperties(dtype=torch.float32)
    huge = TensorStorageMetadata(properties, torch.Size([2**40, 2**20]), [])
    contents = Metadata({"model.a": huge}, storage_meta=StorageMeta())
    (tmp_path / CONTENTS).write_bytes(pickle.dumps(contents))
    with pytest.raises(UserError, match="announces tensors of 4,611,686,018,427,387,904 bytes"):
        read_tensors(tmp_path, 1000)


@pytest.mark.slow
def test_processes_that_see_other_folders_are_told_at_the_first_save(tmp_path):
    """As on two machines without a common file system: each has the path, in a place of its own."""
    data = tmp_path / "data"
    arguments(tmp_path, "elsewhere")  # writes the data
    flags = [*arguments(tmp_path, "elsewhere", *SHAPE, "--parallel=fsdp"), "--out_dir=run"]
    places = [tmp_path / f"machine{rank}" for rank in range(2)]
    done = run_each_in(places, "train.py", *flags, f"--data_dir={data}")
    for process in done:
        assert process.returncode == 2, process.stderr
        assert "out_dir must be one folder that all processes see" in process.stderr
        assert "Traceback" not in process.stderr
    assert not (places[0] / "run" / LAST).exists()


def run_each_in(places, script, *flags):
    """Several processes of one run, each started in a folder of its own -> how they ended."""
    shared = {"WORLD_SIZE": str(len(places)), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, place in enumerate(places):
        place.mkdir()
        processes.append(
            subprocess.Popen(
                [sys.executable, ROOT / script, *flags],
                cwd=place,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(script, process.returncode, *streams)
        for process, streams in zip(processes, said)
    ]


def test_a_table_of_contents_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, ("true",)

    (tmp_path / CONTENTS).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="system, which is no part of one"):
        reader_of(tmp_path).read_metadata()


@pytest.mark.slow
def test_all_end_when_one_is_killed_and_torchrun_goes_on(tmp_path):
    """One process of two is killed in the middle: within a minute all have begun again, from the
    last checkpoint, and the losses are those of a run that nobody disturbed."""
    run = [*SHAPE, "--optimizer_variant=muonsn8", "--max_iters=60", "--parallel=fsdp"]
    flags = arguments(tmp_path, "killed", *run)
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"),
        *("--master_addr=127.0.0.1", f"--master_port={free_port()}", "train.py", *flags),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        began = None
        for line in process.stdout:
            if began is None and line.startswith("iter 10:"):
                victim = children_of(process.pid)[1]
                os.kill(victim, signal.SIGKILL)
                began = time.monotonic()
            if began is not None and line.startswith("resuming"):
                assert re.search(r"from iteration (4|8|12|16)\b", line), line
                assert time.monotonic() - began < 60
                break
        else:
            pytest.fail(process.stderr.read())
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert said.count("error: another process of this run ended") <= 1
    assert "Traceback" not in said.split("torch/distributed")[0]
    train.main(arguments(tmp_path, "whole", *run[:-1]))
    rows = numbers(tmp_path / "killed"), numbers(tmp_path / "whole")
    assert len(rows[0]) == len(rows[1])
    for one, other in zip(*rows):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-2)


def children_of(pid):
    """Process ids of the children of a process, in the order of their birth."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return sorted(map(int, file.read().split()))
