"""Updates inside backward: the same weights, one gradient at a time; what is refused."""

import gc
import weakref

import pytest
import torch
from torch import nn

from leangpt.optim import (
    Adafactor,
    AdamSN,
    GradientNotFinite,
    MuonSN,
    build_optimizer,
    check_gradients,
    fuse_into_backward,
    state_bytes,
)
from leangpt.system.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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
        assert fused.strategy.norm.item() == pytest.approx(before, rel=1e-4)
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


def test_fused_backward_refuses_ddp(monkeypatch):
    """Its reductions would come after the update: weights of the ranks would drift apart."""
    # two ranks, as far as torch.distributed tells
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="one process or on sharded weights .*: DDP reduces"):
        build_optimizer(small_net(), "adamsn8", fused_backward=True)


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


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_is_named(max_norm, bad, dtype):
    net = small_net(dtype)
    optimizer = build_optimizer(net, "adamsn8", fused_backward=True, grad_clip=max_norm)
    x = torch.ones(2, 16, dtype=dtype)
    for _ in range(2):
        net(x).sum().backward()
        optimizer.step()
    net[0].bias.register_hook(lambda g: g.index_fill(0, torch.tensor([7]), bad))
    net(x).sum().backward()
    with pytest.raises(GradientNotFinite, match="the gradient of 0.bias is not finite after 3"):
        optimizer.step()


def test_a_late_answer_is_read_before_a_checkpoint():
    """On CUDA step() does not wait; check_gradients does."""
    net = small_net()
    optimizer = build_optimizer(net, "adamsn8", fused_backward=True)
    check_gradients(optimizer)
    strategy = optimizer.strategy
    strategy.unread = [net[0].weight, net[2].bias], torch.tensor([1.0, torch.inf]), None
    with pytest.raises(GradientNotFinite, match="2.bias"):
        check_gradients(optimizer)
    check_gradients(optimizer)  # said once


@pytest.mark.parametrize("options", [{"fused_backward": True}, {"gradient_bits": 8}])
def test_a_model_and_its_state_are_freed_when_nobody_holds_them(options):
    """Hooks on parameters hold nothing: a notebook's second model finds the first one's memory."""
    net = small_net()
    optimizer = build_optimizer(net, "adamsn8", 1e-3, **options)
    net(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    alive = weakref.ref(net[0].weight), weakref.ref(optimizer)
    del net, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_gradients_stay_where_the_optimizer_is_gone():
    """And another optimizer may follow on the same model."""
    net = small_net()
    build_optimizer(net, "adamsn8", 1e-3, fused_backward=True)
    gc.collect()
    net(torch.randn(8, 16)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
