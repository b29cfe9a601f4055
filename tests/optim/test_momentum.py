"""Fewer bits: quantised momenta and stochastic rounding."""

import pytest
import torch
from torch import nn

from leangpt.optim import AdamSN, MuonSN, adamsn, state_bytes
from leangpt.optim.batches import make_item
from leangpt.optim.momentum import (
    BLOCK,
    LEVELS,
    dequantize,
    dither,
    mix,
    new_momentum,
    quantize_into,
    round_to_bfloat16,
    update_momentum,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.3e-5, 1e-39, 65504.1, -0.7])
def test_bfloat16_rounding_is_unbiased(value):
    draws = 100_000
    rounded = round_to_bfloat16(torch.full((draws,), value), generator()).double()
    low, high = rounded.min(), rounded.max()
    exact = torch.tensor(value, dtype=torch.float32).double()
    assert low <= exact <= high and len(rounded.unique()) <= 2  # only the two neighbours
    sigma = (high - low) / 2 / draws**0.5
    assert abs(rounded.mean() - exact) <= 4 * sigma


def test_bfloat16_rounding_keeps_what_needs_none():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf")])
    assert torch.equal(round_to_bfloat16(values, generator()), values.bfloat16())
    assert round_to_bfloat16(torch.tensor([float("nan")]), generator()).isnan().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_error_of_a_quantised_momentum_is_uniform(bits):
    """Over steps, at every place of a block, however small its number beside the others."""
    draws = 100_000
    torch.manual_seed(0)
    block = torch.randn(BLOCK) * torch.logspace(-4, 0, BLOCK)
    value = block.repeat(draws, 1)  # N tensors of one block, each written at a step of its own
    state = {k: torch.stack([v] * draws) for k, v in new_momentum(block, bits).items()}
    codes, scales = state["momentum"], state["momentum_scale"]
    steps = torch.arange(1, draws + 1).view(-1, 1, 1)
    quantize_into(codes, scales, steps, value)
    width = scales[0].item()
    assert block.abs().max() / LEVELS[bits] <= width
    assert width <= 1.02 * block.abs().max() / LEVELS[bits]
    error = (dequantize(codes, scales, steps, value.shape).double() - block) / width
    assert error.abs().max() <= 0.5001
    assert (error.mean(0).abs() <= 4 * (1 / 12 / draws) ** 0.5).all()
    assert ((error.square().mean(0) - 1 / 12).abs() <= 4 * (1 / 180 / draws) ** 0.5).all()
    wrong = dequantize(codes, scales, steps + 1, value.shape).double() - block
    assert (wrong / width).abs().max() > 0.9  # the dither of another step is not this one's


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_stays_zero_among_other_numbers(bits):
    torch.manual_seed(0)
    value = torch.randn(200, 3 * BLOCK + 5)
    value[:, ::3] = 0.0
    state = {k: torch.stack([v] * 200) for k, v in new_momentum(value[0], bits).items()}
    codes, scales = state["momentum"], state["momentum_scale"]
    assert not dequantize(codes, scales, 0, value.shape).any()  # before the first update
    for step in range(1, 20):
        quantize_into(codes, scales, step, value)
        read = dequantize(codes, scales, step, value.shape)
        assert torch.equal(read == 0, value == 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_without_one_for_zero_are_rewritten(bits):
    """What a run saved before reads as it did, within the rounding of today."""
    torch.manual_seed(0)
    value, step = torch.randn(1, 64, BLOCK), 7
    levels = LEVELS[bits]
    scales = (value.abs().amax(-1, keepdim=True) * (1 + 2**-7) / (levels + 0.5)).bfloat16()
    old = (value / scales.float() + dither(scales, step)).floor()
    before = scales.float() * (old + 0.5 - dither(scales, step))
    codes = old.to(torch.int8)
    if bits == 4:
        nibbles = (old + 8).to(torch.uint8)
        codes = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
    p = nn.Parameter(torch.zeros(64, BLOCK))
    optimizer = MuonSN([p], momentum_bits=bits)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] |= {"momentum": codes[0], "momentum_scale": scales[0], "step": step}
    del saved["param_groups"][0]["momentum_format"]  # as it was saved then
    optimizer.load_state_dict(saved)
    state = optimizer.state[p]
    read = dequantize(state["momentum"][None], state["momentum_scale"][None], step, value.shape)
    assert ((read - before).abs() <= 0.51 * state["momentum_scale"].float()).all()
    again = optimizer.state_dict()
    optimizer.load_state_dict(again)  # rewritten once
    assert torch.equal(optimizer.state[p]["momentum"], again["state"][0]["momentum"])


def test_errors_of_one_block_do_not_hang_together():
    """Though one hash makes the dither of all 32."""
    torch.manual_seed(0)
    value = torch.randn(50_000, BLOCK)
    state = {k: torch.stack([v] * len(value)) for k, v in new_momentum(value[0], 4).items()}
    codes, scales = state["momentum"], state["momentum_scale"]
    quantize_into(codes, scales, 7, value)  # all at one step: the scales alone differ
    error = (dequantize(codes, scales, 7, value.shape) - value) / scales.view(-1, 1).float()
    apart = torch.corrcoef(error.mT) - torch.eye(BLOCK)
    assert apart.abs().max() < 0.03


def test_every_bit_of_step_and_scale_changes_half_of_the_dither():
    words = torch.randint(2**32, (20_000,), generator=generator())
    bits = 2 ** torch.arange(32)
    for flipped in bits:
        changed = (mix(words) ^ mix(words ^ flipped)).unsqueeze(1).bitwise_and(bits) > 0
        assert (changed.double().mean(0) - 0.5).abs().max() < 0.03
    assert len(mix(torch.arange(100_000)).unique()) == 100_000


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_momentum_learns_a_steady_gradient(bits):
    """Errors of 1,000 steps are independent: each decays by beta, and their mean is zero."""
    grad, beta, steps = torch.randn(1, 64, 64, generator=generator()), 0.9, 1000
    state = {k: v.unsqueeze(0) for k, v in new_momentum(grad[0], bits).items()}
    total = squares = 0.0
    for step in range(1, steps + 1):
        update_momentum(state, grad, beta, step, None)
        if step > 100:
            read = dequantize(state["momentum"], state["momentum_scale"], step, grad.shape)
            error = (read - grad).view(-1, BLOCK) / state["momentum_scale"].float().view(-1, 1)
            total, squares = total + error, squares + error.square().mean()
    variance = squares / (steps - 100)
    assert abs(variance * 12 * (1 - beta**2) - 1) < 0.05
    mean_square = (total / (steps - 100)).square().mean()
    independent = (steps - 100) * (1 - beta) / (1 + beta)  # draws' worth of a decaying sum
    assert 0.8 < mean_square / (variance / independent) < 1.25


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("shape", [(6, 4), (33,), (64, 32), (0, 4)])
def test_momentum_of_every_width_averages_gradients(bits, shape):
    p = torch.zeros(shape)
    state = {k: v.unsqueeze(0) for k, v in new_momentum(p, bits).items()}
    grads = torch.randn(20, *shape, generator=generator(1))
    exact, source = torch.zeros(shape), generator()
    for step, grad in enumerate(grads, 1):
        exact = 0.9 * exact + 0.1 * grad
        value = update_momentum(state, grad.unsqueeze(0), 0.9, step, lambda: source)
    tolerance = {32: 1e-6, 16: 0.01, 8: 0.02, 4: 0.3}[bits]
    assert value.shape == (1, *shape)
    assert torch.allclose(value[0], exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("bits, per_number", [(32, 4), (16, 2), (8, 1 + 2 / 32), (4, 0.5 + 2 / 32)])
def test_momentum_bytes(bits, per_number):
    p = nn.Parameter(torch.ones(64, 96))
    p.grad = torch.ones(64, 96)
    for cls, small in ((AdamSN, 64), (MuonSN, 64)):
        optimizer = cls([p], momentum_bits=bits)
        if cls is AdamSN:
            optimizer = cls([p], momentum_bits=bits, partition="row")
        optimizer.step()
        assert state_bytes(optimizer) == 64 * 96 * per_number + 4 * small


def train(optimizer_of, dtype, steps=150):
    """A linear regression whose loss ends near zero; returns the loss over all the data."""
    source = generator(3)
    x, target = torch.randn(256, 32, generator=source), torch.randn(8, 32, generator=source)
    layer = nn.Linear(32, 8, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 32, generator=source) * 0.1)
    layer = layer.to(dtype)
    optimizer = optimizer_of(layer.parameters())
    y = x @ target.T
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - i / steps)
        rows = torch.randint(256, (64,), generator=source)
        loss = (layer(x[rows].to(dtype)).float() - y[rows]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (x @ layer.weight.float().T - y).square().mean().item()


@pytest.mark.parametrize("cls", [AdamSN, MuonSN])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_low_bits_train_as_well(cls, bits):
    wide = train(lambda p: cls(p), torch.float32)
    narrow = train(lambda p: cls(p, momentum_bits=bits), torch.float32)
    assert narrow < wide + 0.1


def test_stochastic_rounding_makes_small_steps_count():
    """Steps of a hundredth of bfloat16's spacing: lost to nearest, kept on average."""
    for stochastic, expected in ((True, 1.0), (False, 0.0)):
        p = nn.Parameter(torch.ones(4096, 2, dtype=torch.bfloat16))
        optimizer = AdamSN([p], lr=4e-5, stochastic_rounding=stochastic)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved = (1 - p.detach().float().mean()) / 4e-3
        assert abs(moved - expected) < 0.05


def test_statistics_are_float32_and_steps_repeat():
    results = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 1000)  # rounding does not read the global generator
        p = nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
        optimizer = MuonSN([p], lr=1e-2, momentum_bits=8)
        for i in range(3):
            p.grad = torch.randn(64, 32, generator=generator(i)).bfloat16()
            optimizer.step()
        assert optimizer.state[p]["row_mean_square"].dtype == torch.float32
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("partition", ["row", "element", 8])
def test_row_slices_of_large_matrices_change_nothing(bits, partition, monkeypatch):
    results = []
    for size in (1 << 24, 1 << 12):
        monkeypatch.setattr(adamsn, "SLICE", size)
        p = nn.Parameter(torch.ones(300, 40, dtype=torch.bfloat16))
        optimizer = AdamSN(
            [p], lr=1e-2, momentum_bits=bits, partition=partition, stochastic_rounding=False
        )
        for i in range(5):
            p.grad = torch.randn(300, 40, generator=generator(i)).bfloat16()
            optimizer.step()
        results.append(
            (
                p.detach().float(),
                len(adamsn.row_slices(make_item(optimizer, p, optimizer.param_groups[0]))),
            )
        )
    (whole, one), (sliced, many) = results
    assert (one, many) == (1, 4)
    if bits != 16:
        assert torch.equal(whole, sliced)
    else:  # momenta draw their noise slice by slice: alike up to a few roundings
        assert (whole - sliced).abs().max() < 0.06
        assert (whole - sliced).abs().mean() < 0.0005


def test_a_nan_of_any_bits_stays_one():
    """CUDA's has all bits set: what is added to round it must not carry it over to zero."""
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32)
    value = nans.view(torch.float32).repeat(100)
    rounded = round_to_bfloat16(value, torch.Generator().manual_seed(0))
    assert rounded.isnan().all()
