"""A machine's rates: measured once, kept, used by plans."""

import pytest
import torch

import plan
from leangpt.memory.speed import calibrate, known_rates, rates_file

CPU = torch.device("cpu")


@pytest.mark.slow
def test_rates_are_kept_and_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LEANGPT_CACHE", str(tmp_path))
    assert known_rates(CPU, torch.float32) is None
    rates = calibrate(CPU, torch.float32)
    assert rates.measured and known_rates(CPU, torch.float32) == rates
    assert 1e8 < rates.products < 1e14 and 1e8 < rates.bandwidth < 1e13
    assert 1e7 < rates.attention < 1e14 and 1e-8 < rates.launch < 1e-2
    plan.main(["config/train_gpt2.py", "--device=cpu", "--memory=30GB"])
    assert " s a step; " in capsys.readouterr().out
    rates_file(CPU, torch.float32).write_text('{"products": 1}')
    assert known_rates(CPU, torch.float32) is None  # a file that is none of its
