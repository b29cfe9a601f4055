"""Codes, scales and zeros: close to the weights, or to what the layer gives."""

import itertools

import pytest
import torch
from int4_models import linear, relative

from leangpt.int4 import rounding, rounding_cpu, rounding_triton
from leangpt.int4.rounding import fit_groups, round_to_inputs
from leangpt.layers import int4_layouts
from leangpt.system.triton import AVAILABLE, INTERPRETED


def minmax(weight, group_size):
    x = weight.unflatten(-1, (-1, group_size))
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 15
    return (((x - low) / scale).round() * scale + low).flatten(-2)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rounding_beats_minimum_and_maximum(group_size):
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    codes, scale, zero = fit_groups(weight, group_size)
    scale_zero = torch.stack([scale.T, zero.T], -1)
    ours = (int4_layouts.dequantize(codes, scale_zero, torch.float32) - weight).norm()
    assert ours < 0.995 * (minmax(weight, group_size) - weight).norm()
    assert codes.max() == 15 and codes.min() == 0


def test_rounding_to_inputs_keeps_the_outputs():
    weight = linear(96, 128).weight.detach()
    x = torch.randn(500, 24) @ torch.randn(24, 128) + 0.1 * torch.randn(500, 128)
    want = x @ weight.T
    errors = [
        (x @ back(rounded).T - want).norm().item()
        for rounded in (fit_groups(weight, 32), round_to_inputs(weight, 32, x))
    ]
    assert errors[1] < 0.3 * errors[0]


def back(rounded):
    """The float32 weights (N, K) that (codes, scale, zero) stand for."""
    codes, scale, zero = rounded
    return int4_layouts.dequantize(codes, torch.stack([scale.T, zero.T], -1), torch.float32)


def test_weights_on_a_grid_stay_there():
    """Those of a GGUF file have 16 values in a group of 32: nothing to lose."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (96, 128), generator=generator).float()
    codes[:, ::32], codes[:, 1::32] = 0, 15
    scale, zero = torch.rand(2, 96, 4, generator=generator) * 0.01
    weight = (codes.view(96, 4, 32) * (0.01 + scale[..., None]) - zero[..., None]).flatten(1)
    x = torch.randn(500, 24) @ torch.randn(24, 128) + 0.1 * torch.randn(500, 128)
    assert relative(x @ back(round_to_inputs(weight, 32, x)).T, x @ weight.T) < 3e-3


STEPS = {
    "c": pytest.param(
        rounding_cpu,
        "cpu",
        marks=pytest.mark.skipif(rounding_cpu.library() is None, reason="no C compiler"),
    ),
    "triton": pytest.param(
        rounding_triton,
        "cpu" if INTERPRETED else "cuda",
        marks=pytest.mark.skipif(
            not AVAILABLE, reason="needs CUDA, or Triton and TRITON_INTERPRET=1"
        ),
    ),
}


@pytest.mark.parametrize("steps, device", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("rows,inputs,group_size", [(70, 96, 32), (33, 128, 64), (16, 256, 128)])
def test_kernels_equal_pytorchs_steps(rows, inputs, group_size, steps, device, monkeypatch):
    weight = linear(rows, inputs).weight.detach()
    weight[3] = 0.25  # all alike: no slope to fit
    x = torch.randn(600, inputs) @ torch.randn(inputs, inputs) + torch.randn(600, inputs)
    weight, x = weight.to(device), x.to(device)
    monkeypatch.setattr(rounding, "steps_for", lambda device: steps)
    by_kernels = round_to_inputs(weight, group_size, x)
    monkeypatch.setattr(rounding, "steps_for", lambda device: rounding.PLAIN)
    plain = round_to_inputs(weight, group_size, x)
    for found, want in zip(by_kernels, plain):  # but for codes that were as near to two values
        assert found.shape == want.shape and found.dtype == want.dtype
        assert (found == want).float().mean() > 0.995
    errors = [((back(rounded) - weight) @ x.T).norm().item() for rounded in (by_kernels, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_rounding_leaves_the_precision_of_products_alone():
    torch.set_float32_matmul_precision("high")
    try:
        round_to_inputs(linear(16, 64).weight.detach(), 32, torch.randn(100, 64))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_each_sweep_lowers_the_error(monkeypatch):
    """Never raised by any sweep, in float64, scales and zeros as bfloat16 holds them."""
    weight = linear(70, 128).weight.detach()
    x = torch.randn(600, 128) @ torch.randn(128, 128)
    errors = []
    for sweeps in (0, 1, 2, 5, 20):
        monkeypatch.setattr(rounding, "SWEEPS", sweeps)
        lost = back(round_to_inputs(weight, 32, x)) - weight
        gram = (x.T @ x / len(x)).double()
        gram.diagonal().add_(rounding.DAMPING * gram.diagonal().mean())
        errors.append((lost.double() @ gram * lost).sum(1))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert errors[2].sum() < 0.9 * errors[0].sum()


def test_degenerate_weights_and_inputs():
    constant = torch.full((16, 64), 0.25)
    zeros, ones = torch.zeros(10, 64), torch.ones(10, 64)
    for rounded in (
        fit_groups(constant, 32),
        fit_groups(constant * 0, 32),
        round_to_inputs(constant, 32, zeros),
        round_to_inputs(constant, 32, ones),
    ):
        found = back(rounded)
        assert torch.isfinite(found).all() and (found - found[0, 0]).abs().max() < 1e-3
        assert abs(found[0, 0].item()) in (0.0, 0.25) or abs(found[0, 0].item() - 0.25) < 2e-3
