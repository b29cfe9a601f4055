"""Fewer bits: quantised momenta, stochastic rounding, and updates inside backward."""

import weakref

import pytest
import torch
from torch import nn

import adamsn
import low_byte
from errors import UserError
from optimizers import Adafactor, AdamSN, MuonSN, build_optimizer, fuse_into_backward, state_bytes
from quantized_state import (
    BLOCK,
    LEVELS,
    dequantize,
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
        results.append((p.detach().float(), len(optimizer.row_slices(optimizer.make_item(
            p, optimizer.param_groups[0])))))  # fmt: skip
    (whole, one), (sliced, many) = results
    assert (one, many) == (1, 4)
    if bits != 16:
        assert torch.equal(whole, sliced)
    else:  # momenta draw their noise slice by slice: alike up to a few roundings
        assert (whole - sliced).abs().max() < 0.06
        assert (whole - sliced).abs().mean() < 0.0005


# ---------------------------------------------------------------------- updates inside backward


def small_net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)


@pytest.mark.parametrize("cls", [AdamSN, Adafactor, MuonSN])
def test_fused_backward_is_the_same_update(cls):
    x = torch.randn(8, 16, generator=generator())
    nets = [small_net(), small_net()]
    plain = cls(nets[0].parameters(), lr=1e-2, update_clip=1.0)
    fused = fuse_into_backward(cls(nets[1].parameters(), lr=1e-2, update_clip=1.0))
    for i in range(5):
        for net, optimizer in zip(nets, (plain, fused)):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
            net(x).square().mean().backward()
            gone = all(p.grad is None for p in net.parameters())
            assert gone == (optimizer is fused)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("cls", [AdamSN, MuonSN])
def test_fused_backward_clips_by_the_norm_of_the_step_before(cls):
    x = torch.randn(8, 16, generator=generator())
    nets = [small_net(), small_net()]
    plain, fused = (cls(net.parameters(), lr=1e-2) for net in nets)
    fuse_into_backward(fused, max_norm=0.05)
    before, scales = None, []
    for i in range(6):
        if i == 3:  # what is needed travels with the state
            fused.load_state_dict(fused.state_dict())
        for net, optimizer in zip(nets, (plain, fused)):
            (net(x).square().mean() * 0.2**i).backward()
            if optimizer is plain:
                norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
                scales.append(1.0 if before is None else min(1.0, 0.05 / (before + 1e-6)))
                for p in net.parameters():
                    p.grad *= scales[-1]
                before = norm.item()
            optimizer.step()
            optimizer.zero_grad()
        assert fused.fused.norm.item() == pytest.approx(before, rel=1e-4)
    assert scales[1] < 0.5 and scales[-1] == 1.0
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.allclose(p, q, atol=1e-5)
    with pytest.raises(UserError, match="max_norm must not be negative"):
        fuse_into_backward(cls(small_net().parameters()), max_norm=-1.0)


def test_fused_backward_goes_on_after_a_state_is_loaded():
    nets = [small_net(), small_net()]
    x = torch.randn(8, 16, generator=generator())
    optimizers = [fuse_into_backward(AdamSN(net.parameters(), lr=1e-2)) for net in nets]
    for i in range(4):
        if i == 2:
            optimizers[1].load_state_dict(optimizers[1].state_dict())
        for net, optimizer in zip(nets, optimizers):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
            net(x).square().mean().backward()
            assert all(p.grad is None for p in net.parameters())
            optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.equal(p, q)


def test_no_gradient_outlives_its_step():
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = AdamSN([p])
    for _ in range(2):
        p.grad = torch.ones(6, 4)
        seen = weakref.ref(p.grad)
        optimizer.step()
        p.grad = None
        assert seen() is None


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_fused_backward_refuses_ddp_and_fsdp(wrap, monkeypatch):
    """Their reductions would come after the update: weights of the ranks would drift apart."""
    net = small_net()
    if wrap == "ddp":  # two ranks, as far as torch.distributed tells
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    else:
        monkeypatch.setattr(low_byte, "is_sharded", lambda p: True)
    with pytest.raises(UserError, match="DDP and FSDP" if wrap == "ddp" else "FSDP"):
        build_optimizer(net, "adamsn8", fused_backward=True)


def test_update_clip_bounds_each_update():
    p = nn.Parameter(torch.zeros(8, 4))
    optimizer = AdamSN([p], lr=1.0, update_clip=0.5)
    p.grad = torch.randn(8, 4)
    optimizer.step()
    assert p.detach().square().mean().sqrt() <= 0.5 + 1e-6


def test_fused_backward_refuses_what_it_cannot_do():
    net = small_net()
    optimizer = build_optimizer(net, "adamsn8", fused_backward=True)
    assert all(group["update_clip"] == 1.0 for group in optimizer.param_groups)
    x = torch.randn(8, 16)
    net(x).sum().backward()
    with pytest.raises(UserError, match="gradient_accumulation_steps=1"):
        net(x).sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="closures"):
        optimizer.step(lambda: net(x).sum())
    with pytest.raises(UserError, match="skip_nonfinite"):
        build_optimizer(small_net(), "adamsn", fused_backward=True, skip_nonfinite=True)
    with pytest.raises(UserError, match="float16"):
        build_optimizer(small_net(torch.float16), "adamsn", fused_backward=True)
    with pytest.raises(UserError, match="inside backward"):
        build_optimizer(small_net(), "adam", fused_backward=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(net(x).sum()).backward()
    with pytest.raises(UserError, match="GradScaler"):
        scaler.step(optimizer)


def test_bytes_of_weights_gradients_and_state():
    """At most 5.2 bytes a parameter; 3.2 where gradients do not outlive their update."""
    net = nn.Sequential(nn.Embedding(512, 256), nn.Linear(256, 1024), nn.Linear(1024, 256))
    net = net.to(torch.bfloat16)
    numbers = sum(p.numel() for p in net.parameters())
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    for fused, limit in ((False, 5.2), (True, 3.2)):
        optimizer = build_optimizer(net, "adamsn8", fused_backward=fused)
        net(torch.randint(512, (4, 8))).float().square().mean().backward()
        grads = sum(p.grad.numel() * 2 for p in net.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        assert (weights + grads + state_bytes(optimizer)) / numbers <= limit
