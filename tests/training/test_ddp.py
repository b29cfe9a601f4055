"""Two gloo processes under torchrun train as one process with the doubled batch does."""

import os
import signal
import subprocess
import sys

import pytest
from tiny_run import ROOT, arguments, determined, run_script
from two_processes import free_port

import train
from leangpt.runs.checkpoint import LAST, load_checkpoint
from leangpt.system.errors import UserError
from leangpt.training.batches import share_of


def torchrun(*flags):
    """The command line of train.py in two processes on this machine."""
    return [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
        "train.py",
        *flags,
    ]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def numbers(out_dir):
    """Rows without train_loss: evaluation samples it by the micro-batch, whose size differs."""
    return [[float(value or 0) for value in row[:3] + row[4:]] for row in determined(out_dir)]


@pytest.mark.parametrize("batch_size, micro_batches", [(5, 1), (12, 1), (1, 3), (7, 5), (4, 8)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shares_make_up_the_iteration(batch_size, micro_batches, world_size):
    settings = train.Settings(batch_size=batch_size, gradient_accumulation_steps=micro_batches)
    if micro_batches % world_size and batch_size < world_size:
        with pytest.raises(UserError, match="cannot be shared out among"):
            share_of(settings, 0, world_size)
        return
    weights = [[0.0] * batch_size for _ in range(micro_batches)]
    for rank in range(world_size):
        share = share_of(settings, rank, world_size)
        own = range(0 if share.stride == 1 else rank, micro_batches, share.stride)
        assert len(own) == share.count
        for index in own:
            rows = range(batch_size)[share.rows]
            for row in rows:  # of a mean over the rows, averaged over the processes
                weights[index][row] += 1 / share.divisor / len(rows) / world_size
    for weight in sum(weights, []):
        assert weight == pytest.approx(1 / batch_size / micro_batches)


@pytest.mark.slow
def test_two_processes_share_the_rows_of_one_micro_batch(tmp_path):
    """As with the README's config, whose gradient_accumulation_steps is 1."""
    flags = ["--max_iters=6", "--eval_interval=3", "--eval_iters=0", "--batch_size=5"]
    train.main(arguments(tmp_path, "one", *flags))
    result = run_script(*torchrun(*arguments(tmp_path, "two", *flags)), env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert "sequences of 16; of each micro-batch 2 or so for each process" in result.stdout
    for one, two in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", (["--attention_policy=cache"], ["--attention_policy=recompute", "--q_chunk=8"])
)
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, policy):
    schedule = [
        "--max_iters=8",
        "--eval_interval=3",
        "--optimizer_variant=adamsn",
        "--eval_iters=0",
        *policy,
    ]
    train.main(
        arguments(tmp_path, "one", *schedule, "--batch_size=8", "--gradient_accumulation_steps=2")
    )
    result = run_script(
        *torchrun(
            *arguments(
                tmp_path, "two", *schedule, "--batch_size=4", "--gradient_accumulation_steps=4"
            )
        ),
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr
    assert "2 processes (gloo)" in result.stdout
    assert result.stdout.count("\nstep 0:") == 1  # one process speaks
    for one, two in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, abs=2e-5)
    one, two = (load_checkpoint(tmp_path / name / LAST)["model"] for name in ("one", "two"))
    for name, tensor in one.items():
        assert tensor.allclose(two[name], atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(
            ("--parallel=fsdp", "--n_embd=32", "--gradient_accumulation_steps=100"),
            marks=pytest.mark.campaign,
        ),
        pytest.param(
            ("--context_parallel=2", "--position=rope", "--dropout=0"), marks=pytest.mark.campaign
        ),
    ],
    ids=["ddp", "long iterations of shards", "pieces"],
)
def test_a_signal_stops_all_processes_together_and_the_run_continues(tmp_path, more):
    """Within seconds, though they log next in a million iterations."""
    flags = [
        "--log_interval=1000000",
        "--dropout=0.1",
        "--gradient_accumulation_steps=2",
        "--eval_interval=100000",
        "--warmup_iters=0",
        "--decay_lr=False",
        *more,
    ]
    command = [sys.executable, *torchrun(*arguments(tmp_path, "cut", *flags, "--max_iters=100000"))]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("iter 0:"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        process.wait(timeout=60)
    finally:
        process.kill()
    assert "stopped by SIGTERM before iteration" in rest
    stopped = load_checkpoint(tmp_path / "cut" / LAST)["iter_num"]
    assert stopped > 0
    flags.append(f"--max_iters={stopped + 3}")
    for name, start in (("cut", "resume"), ("whole", "scratch")):
        result = run_script(
            *torchrun(*arguments(tmp_path, name, *flags, f"--init_from={start}")), env=ENVIRONMENT
        )
        assert result.returncode == 0, result.stderr
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, says",
    (
        (
            ["--batch_size=1", "--gradient_accumulation_steps=3"],
            "gradient_accumulation_steps=3 and batch_size=1 cannot be shared out among 2 processes",
        ),
        (
            [
                "--gradient_accumulation_steps=2",
                "--optimizer_variant=muonsn8",
                "--grad_clip=0",
                "--optimizer_options=fused_backward=True",
                "--parallel=ddp",
            ],
            "fused_backward runs on one process or on sharded weights (--parallel=fsdp)",
        ),
    ),
)
def test_what_processes_cannot_do_together_is_refused(tmp_path, flags, says):
    result = run_script(*torchrun(*arguments(tmp_path, "run", *flags)), env=ENVIRONMENT)
    assert result.returncode != 0
    assert f"error: {says}" in result.stderr
    assert not (tmp_path / "run").exists()
