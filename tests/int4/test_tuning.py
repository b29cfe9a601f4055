"""Fitting 4-bit scales to the exact model: nearer to its predictions, codes untouched."""

import copy

import pytest
import torch

from leangpt.int4 import tuning
from leangpt.int4.calibration import calibration, own_text, quantize_gpt_
from leangpt.int4.files import load_int4, save_int4
from leangpt.int4.quantize import int4_layers, quantize_, swapped
from leangpt.int4.tuning import TunedLayer, divergence, quantize_and_tune_
from leangpt.system.errors import UserError
from model import GPT, GPTConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=64, bias=True)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def layers_of(model):
    return list(int4_layers(model).values())


@pytest.mark.slow
def test_fitted_scales_are_nearer_to_the_exact_predictions(model, tmp_path):
    exact, rounded = copy.deepcopy(model), copy.deepcopy(model)
    quantize_gpt_(rounded, 32, calibration(rounded))
    steps = []
    found = quantize_and_tune_(model, 32, 60, report=lambda *args: steps.append(args[:2]))
    fitted = model
    assert all(p.grad is None for p in model.parameters())
    assert 0 < found[1] < found[0] and steps == [(i, 60) for i in range(60)]
    text = own_text(exact, 64, 32, seed=9)
    with torch.no_grad():
        before, after = (divergence(m, exact, text).item() for m in (rounded, fitted))
    assert 0 < after < 0.9 * before
    for old, new in zip(layers_of(rounded), layers_of(fitted), strict=True):
        assert torch.equal(old.codes(), new.codes())
        assert not torch.equal(old.dequantize(), new.dequantize())
    save_int4(fitted, tmp_path / "fitted.safetensors", {})
    loaded, _ = load_int4(GPT, tmp_path / "fitted.safetensors", dtype=torch.float32)
    assert torch.equal(loaded(text)[0], fitted(text)[0])


@pytest.mark.slow
def test_what_fitting_makes_worse_stays_as_it_was(model, monkeypatch):
    monkeypatch.setattr(tuning, "RATE", 1.0)
    rounded = quantize_gpt_(copy.deepcopy(model), 32)
    before, after = quantize_and_tune_(model, 32, 2)
    assert before == after > 0
    for old, new in zip(layers_of(rounded), layers_of(model), strict=True):
        assert torch.equal(old.dequantize(), new.dequantize())


def test_a_tuned_layer_is_the_layer(model):
    quantize_(model, 32)
    text = own_text(model, 4, 32)
    expected = model(text)[0]
    tuned = {name: TunedLayer(layer) for name, layer in int4_layers(model).items()}
    with swapped(model, tuned):
        found = model(text)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    for layer in tuned.values():
        layer.store()
    assert torch.equal(model(text)[0], expected)


def test_every_scale_and_zero_gets_a_gradient(model):
    exact = copy.deepcopy(model)
    quantize_(model, 64)
    tuned = {name: TunedLayer(layer) for name, layer in int4_layers(model).items()}
    with swapped(model, tuned):
        divergence(model, exact, own_text(exact, 8, 32)).backward()
    for layer in tuned.values():
        assert layer.scale.grad.abs().max() > 0 and layer.zero.grad.abs().max() > 0


def test_no_steps_are_refused(model):
    with pytest.raises(UserError, match="at least one step, not 0"):
        quantize_and_tune_(model, 32, 0)
    assert not layers_of(model)
