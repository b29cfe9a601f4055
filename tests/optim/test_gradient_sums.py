"""Gradients summed in bits over several backward passes: unbiased, clipped, none if not finite."""

import pytest
import torch
from torch import nn

from leangpt.optim import AdamSN, GradientNotFinite, build_optimizer, sum_in_bits
from leangpt.optim.backward import gradient_sums
from leangpt.optim.backward.gradient_sums import Sum
from leangpt.system.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 4)).to(dtype)


def summed(terms, bits, key=0):
    """The sum of gradients (n, *shape), float32."""
    one = Sum(terms[0], bits, key)
    for term in terms:
        one.add(term)
    return one.total(torch.float32, None, None)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(7, 11), (3, 64), (5,)])
def test_the_sum_is_within_half_a_code_a_term(bits, shape, monkeypatch):
    monkeypatch.setattr(gradient_sums, "CHUNK", 64)  # several chunks, the last one ragged
    terms = torch.randn(6, *shape, generator=generator())
    exact = terms.double().sum(0)
    found = summed(terms, bits)
    assert found.shape == shape
    code = 1.01 * terms.abs().cumsum(0).amax() / {8: 127, 4: 7}[bits]
    assert 0 < (found - exact).abs().max() <= 6 * code / 2


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_the_sum_is_unbiased(bits):
    """Over many dithers the mean error is that of as many uniform ones: none."""
    terms = torch.randn(4, 2, 64, generator=generator()) * torch.logspace(-2, 0, 4)[:, None, None]
    exact = terms.double().sum(0)
    draws = 1500
    found = torch.stack([summed(terms, bits, 4096 * key) for key in range(draws)]).double()
    error, deviation = (found - exact).mean(0), (found - exact).std(0)
    assert deviation.max() > 1e-3 and (error / deviation * draws**0.5).abs().max() < 4.5
    assert (error / deviation * draws**0.5).std() == pytest.approx(1.0, abs=0.3)


def test_zero_stays_zero():
    terms = torch.randn(5, 40, generator=generator())
    terms[:, ::3] = 0
    for bits in (8, 4):
        assert (summed(terms, bits)[::3] == 0).all()


def accumulate(net, optimizer, x):
    for part in x.chunk(4):
        (net(part).square().mean() / 4).backward()
    return optimizer


@pytest.mark.parametrize("variant", ["adamsn8", "muonsn8", "adafactor"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_steps_are_those_of_float_gradients(variant, clip, monkeypatch):
    """With sums so fine that their codes do not count, but for the chunks and groups of tensors."""
    monkeypatch.setattr(gradient_sums, "TOGETHER", 100)
    exact = {}

    def quantize_into(codes, scales, key, value):
        scales.fill_(1.0)
        exact[scales.data_ptr()] = value.clone()

    monkeypatch.setattr(gradient_sums, "quantize_into", quantize_into)
    monkeypatch.setattr(
        gradient_sums, "dequantize", lambda c, scales, k, s: exact[scales.data_ptr()].clone()
    )
    nets = [small_net(), small_net()]
    x = torch.randn(32, 16, generator=generator())
    plain = build_optimizer(nets[0], variant)
    ours = build_optimizer(nets[1], variant, gradient_bits=8, grad_clip=clip)
    for _ in range(4):
        accumulate(nets[0], plain, x)
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(nets[0].parameters(), clip)
            assert norm > clip
        accumulate(nets[1], ours, x)
        assert all(p.grad is None for p in nets[1].parameters())
        for optimizer in (plain, ours):
            optimizer.step()
            optimizer.zero_grad()
        if clip:
            assert ours.strategy.norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_repeated_bitwise_after_a_resume(dtype):
    x = torch.randn(32, 16, generator=generator(), dtype=torch.float32).to(dtype)
    nets = [small_net(dtype), small_net(dtype)]
    optimizers = [build_optimizer(n, "adamsn8", gradient_bits=8, grad_clip=1.0) for n in nets]
    for i in range(4):
        if i == 2:
            state = optimizers[1].state_dict()
            again = small_net(dtype)
            again.load_state_dict(nets[1].state_dict())
            nets[1] = again
            optimizers[1] = build_optimizer(again, "adamsn8", gradient_bits=8, grad_clip=1.0)
            optimizers[1].load_state_dict(state)
        for net, optimizer in zip(nets, optimizers):
            accumulate(net, optimizer, x).step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.equal(p, q)


def test_a_bfloat16_gradient_is_rounded_without_bias():
    one = Sum(torch.zeros(64), 8, 0)
    one.add(torch.full((64,), 1 + 2**-10))  # an eighth of the way to the next bfloat16
    value = one.total(torch.float32, None, None).double().mean()
    draws = [
        one.total(torch.bfloat16, None, lambda s=s: generator(s)).double().mean()
        for s in range(300)
    ]
    assert float(torch.stack(draws).mean()) == pytest.approx(float(value), abs=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_what_is_not_finite_moves_no_weight(bits, bad, when):
    net = small_net()
    optimizer = build_optimizer(net, "muonsn8", gradient_bits=bits, grad_clip=1.0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for term in range(4):
        x = torch.ones(2, 16)
        if term == when:
            net[2].weight.register_hook(lambda g: g.index_fill(1, torch.tensor([5]), bad))
        else:
            net[2].weight._backward_hooks = None
        net(x).sum().backward()
    with pytest.raises(GradientNotFinite, match="the gradient of 2.weight is not finite after 0"):
        optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert optimizer.strategy.sums == {}


def test_zero_grad_drops_sums():
    net = small_net()
    optimizer = build_optimizer(net, "adamsn8", gradient_bits=8)
    net(torch.ones(2, 16)).sum().backward()
    assert optimizer.strategy.sums
    optimizer.zero_grad()
    before = net[0].weight.clone()
    optimizer.step()
    assert torch.equal(before, net[0].weight)


def test_bytes():
    for bits, each in ((8, 1.0625), (4, 0.5625)):
        net = nn.Linear(1024, 256).bfloat16()
        optimizer = build_optimizer(net, "adamsn8", gradient_bits=bits)
        assert optimizer.strategy.bytes_of(net.weight) == each * net.weight.numel()
        net(torch.ones(2, 1024).bfloat16()).sum().backward()
        one = optimizer.strategy.sums[net.weight]
        assert one.codes.nbytes + one.scales.nbytes == each * net.weight.numel()


def test_what_is_refused():
    with pytest.raises(UserError, match="8 or 4, not 16"):
        build_optimizer(small_net(), "adamsn8", gradient_bits=16)
    with pytest.raises(UserError, match="leave out one"):
        build_optimizer(small_net(), "adamsn8", gradient_bits=8, fused_backward=True)
    with pytest.raises(UserError, match="adam cannot sum"):
        build_optimizer(small_net(), "adam", gradient_bits=8)
    with pytest.raises(UserError, match="float16"):
        build_optimizer(small_net(torch.float16), "adamsn", gradient_bits=8)
    net = small_net()
    optimizer = sum_in_bits(AdamSN(net.parameters(), lr=1e-2), 4)
    net(torch.ones(2, 16)).sum().backward()
    with pytest.raises(UserError, match="closures"):
        optimizer.step(lambda: None)
    build_optimizer(net, "adamsn8", fused_backward=True)
    with pytest.raises(UserError, match="another optimizer"):
        net(torch.ones(2, 16)).sum().backward()
