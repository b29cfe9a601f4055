"""The peak of one step is what a meter over the whole run sees, and measuring changes nothing."""

import csv

import pytest
import torch
from tiny_run import arguments, run_script

from leangpt.memory.meter import PeakMeter
from leangpt.optim import VARIANTS, build_optimizer
from leangpt.optim.kernels import step_cpu
from leangpt.runs.run import read_run
from leangpt.training.step_peak import step_peak
from model import GPT, GPTConfig


class Steps:
    """A small GPT whose step is forward and backward of two micro-batches, then an update."""

    def __init__(self, variant):
        torch.manual_seed(0)
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 16, "vocab_size": 32}
        self.model = GPT(GPTConfig(**shape))
        self.optimizer = build_optimizer(self.model, variant)

    def step(self, tick=lambda: None):
        for _ in range(2):
            tick()
            x = torch.arange(16).view(1, 16)
            self.model(x, x)[1].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.model.transformer.wte.weight.sum().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_peak_that_a_meter_of_the_whole_run_sees(variant):
    with PeakMeter() as meter:
        run = Steps(variant)
        run.step(), run.step()
        meter.tick()
        meter.peak = meter.now  # from here on, of the third step alone
        run.step()
    metered = Steps(variant)
    metered.step(), metered.step()
    _, peak = step_peak(metered.step, metered.model, metered.optimizer)
    assert abs(peak - meter.peak) <= 64  # the meter of the whole also saw a few scalars


@pytest.mark.slow
def test_a_run_shows_it_from_the_measured_step_on(tmp_path):
    flags = arguments(tmp_path, "run", "--max_iters=5", "--eval_interval=5")
    done = run_script("train.py", *flags)
    assert done.stderr == ""  # the profiler complains there of blocks that it does not know
    lines = [line for line in done.stdout.splitlines() if line.startswith("iter ")]
    assert [", peak " in line for line in lines] == [False, False, True, True, True]
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        peaks = [row["peak_mb"] for row in csv.DictReader(file) if row["loss"]]
    assert peaks[:2] == ["", ""] and len(set(peaks[2:])) == 1
    assert f", peak {float(peaks[2]):.1f} MB, " in lines[2]
    assert read_run(tmp_path / "run").peak_bytes == round(1e6 * float(peaks[2])) > 0


@pytest.mark.slow
def test_it_tells_optimizers_apart():
    peaks = {}
    for variant in ("adam", "adamsn8"):
        run = Steps(variant)
        run.step()
        peaks[variant] = step_peak(run.step, run.model, run.optimizer)[1]
    parameters = sum(p.numel() for p in run.model.parameters())
    # 8 bytes of state, little over 1; without kernels momentum is unpacked to 4 for a moment
    least = 5 if step_cpu.library() else 3
    assert peaks["adam"] - peaks["adamsn8"] > least * parameters


def test_each_micro_batch_empties_the_meter(monkeypatch):
    """The meter holds 2.5 KB an event until it is read: a long accumulation must not add up."""
    read, tick = [], PeakMeter.tick
    monkeypatch.setattr(PeakMeter, "tick", lambda meter: read.append(tick(meter)))
    run = Steps("adam")
    step_peak(run.step, run.model, run.optimizer)
    assert len(read) == 2


def test_a_measured_step_is_bitwise_the_same():
    plain, metered = Steps("adamsn"), Steps("adamsn")
    plain.step(), metered.step()
    result, _ = step_peak(metered.step, metered.model, metered.optimizer)
    assert result == plain.step()
    for one, other in zip(plain.model.parameters(), metered.model.parameters(), strict=True):
        assert torch.equal(one, other)
