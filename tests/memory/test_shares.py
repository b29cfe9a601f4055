"""Steps of several processes: formulas against measured peaks (more: experiments/plan/ranks.py)."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from two_processes import free_port

from experiments.plan import accuracy, ranks
from leangpt.memory.formulas import moments
from leangpt.memory.run import Run
from leangpt.memory.shares import ADDITIONS
from leangpt.system.runtime import leave
from model import GPTConfig

BASE = ranks.draws(1, 1)[0] | dict(
    n_layer=3, n_head=4, n_kv_head=4, n_embd=128, n_inner=None, vocab_size=300, block_size=64,
    batch_size=1, gradient_accumulation_steps=2, position="learned", mlp="gelu", norm="layernorm",
    bias=False, tie_embeddings=True, dropout=0.0, attention_dropout=0.0, attention_policy="cache",
    q_chunk=None, k_chunk=None, checkpoint_layers=False, optimizer_options="", compile=False,
    param_dtype="float32", dtype="float32", processes=2, parallel="fsdp", context_parallel=1,
)  # fmt: skip
INSIDE = dict(optimizer_options="fused_backward=True", param_dtype="bfloat16", dtype="auto")
CASES = {
    "adam, ddp": dict(optimizer_variant="adam", parallel="ddp"),
    "adam, untied, uneven rows": dict(
        optimizer_variant="adam", tie_embeddings=False, vocab_size=1001
    ),
    "adamsn8, three micro-batches": dict(
        optimizer_variant="adamsn8", gradient_accumulation_steps=6, dtype="bfloat16"
    ),
    "muonsn8": dict(optimizer_variant="muonsn8", n_kv_head=2),
    "muonsn4, inside backward": dict(optimizer_variant="muonsn4", n_layer=6, **INSIDE),
    "adafactor, inside backward, layers checkpointed": dict(
        optimizer_variant="adafactor", checkpoint_layers=True, block_size=256, **INSIDE
    ),
}


def work(rank, folder, ports, peaks):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    ranks.listen()
    for port, (name, case) in zip(ports, CASES.items()):
        os.environ["MASTER_PORT"] = str(port)
        peaks[name, rank] = ranks.peak_of(BASE | case, folder)
    leave()


@pytest.mark.slow
def test_the_peak_of_each_process_is_predicted(tmp_path):
    for case in CASES.values():
        accuracy.random_tokens(tmp_path, (BASE | case)["vocab_size"])
    with mp.get_context("spawn").Manager() as manager:
        peaks = manager.dict()
        ports = [free_port() for _ in CASES]
        mp.spawn(work, args=(str(tmp_path), ports, peaks), nprocs=2)
        peaks = dict(peaks)
    for name, case in CASES.items():
        found = moments(ranks.run_of(BASE | case, "cpu", 1)).values()
        predicted = max(sum(parts.values()) for parts in found)
        measured = max(peaks[name, rank] for rank in range(2))
        assert predicted == pytest.approx(measured, rel=0.04), name


def test_shares_are_as_many_rows_as_the_first_process_has():
    config = GPTConfig(n_layer=2, n_head=4, n_embd=64, vocab_size=100, block_size=32)
    one = Run(config, variant="adam")
    three = Run(config, variant="adam", processes=3, parallel="fsdp")
    for whole, share in zip(one.tensors, three.tensors):
        assert share.shape == (-(-whole.shape[0] // 3), *whole.shape[1:])
        assert (
            share.whole
            == whole.numbers
            <= share.padded
            < whole.numbers + 3 * (whole.numbers // whole.shape[0])
        )
    parts = moments(three)["the optimizer's step"]
    assert parts["weights"] == sum(t.bytes * t.count for t in three.tensors)
    assert parts["gradients"] == parts["weights"] and parts["state"] > 2 * parts["weights"]
    assert Run(config, processes=3).tensors == one.tensors  # ddp


def test_lines_of_shares_belong_to_moments_that_there_are():
    assert set(ADDITIONS) <= set(
        moments(Run(GPTConfig(n_layer=2, checkpoint_layers=True))).keys()
    ) | {"backward of the last checkpointed block"}
