"""The peak of one step is what a meter over the whole run sees, and measuring changes nothing."""

import pytest
import torch

from leangpt.memory.meter import PeakMeter
from leangpt.optim import VARIANTS, build_optimizer
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


def test_it_tells_optimizers_apart():
    peaks = {}
    for variant in ("adam", "adamsn8"):
        run = Steps(variant)
        run.step()
        peaks[variant] = step_peak(run.step, run.model, run.optimizer)[1]
    parameters = sum(p.numel() for p in run.model.parameters())
    assert peaks["adam"] - peaks["adamsn8"] > 5 * parameters  # 8 bytes of state, little over 1


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
