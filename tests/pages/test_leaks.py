"""What goes on for long keeps nothing: neither memory nor open files."""

import gc
import os
import sys

import psutil
import pytest
import torch
from tiny_run import arguments

import train
from leangpt.decoding.generate import generate
from leangpt.training.record import RunRecord
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ALLOWED = 2**20  # bytes: what an allocator may still find to map after its first hundreds of steps


def held():
    """(resident bytes, open files) of this process."""
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.campaign
def test_of_hundreds_of_texts_nothing_stays():
    torch.manual_seed(0)
    shape = dict(block_size=64, vocab_size=50, n_layer=2, n_head=4, n_embd=64, position="rope")
    model = GPT(GPTConfig(**shape)).eval()
    prompt = torch.randint(50, (1, 8))

    def write(times, **options):
        for _ in range(times):
            generate(model, prompt, 40, temperature=0.9, **options)

    for options in ({}, {"kv_bits": 8}):
        write(50, **options)
        memory, files = held()
        write(200, **options)
        more, still = held()
        assert more - memory < ALLOWED and still == files


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adam", pytest.param("muonsn8", marks=pytest.mark.campaign)])
def test_of_hundreds_of_iterations_and_saves_nothing_stays(tmp_path, monkeypatch, variant):
    found, report = {}, RunRecord.report

    def report_and_look(record, iteration, loss, norm):
        report(record, iteration, loss, norm)
        if iteration in (200, 600):
            found[iteration] = held()

    monkeypatch.setattr(RunRecord, "report", report_and_look)
    flags = ["--max_iters=601", "--eval_interval=20", "--eval_iters=1", "--log_interval=100"]
    flags += ["--always_save_checkpoint=True", f"--optimizer_variant={variant}"]
    train.main(arguments(tmp_path, "run", *flags))
    assert found[600][0] - found[200][0] < ALLOWED
    assert found[600][1] == found[200][1]
