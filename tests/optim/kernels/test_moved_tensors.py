"""Kernels keep addresses between steps: weights and state whose memory moves are found again."""

import copy

import pytest
import torch
from torch import nn

from leangpt.optim import build_optimizer
from leangpt.optim.kernels import step_cpu

KEPT = ("adamsn", "adamsn8", "adafactor", "muonsn8", "muonsn0")


def make_net():
    torch.manual_seed(0)
    return nn.ModuleDict({"wte": nn.Embedding(40, 64), "c_fc": nn.Linear(64, 96)})


def steps(net, optimizer, seeds):
    for seed in seeds:
        source = torch.Generator().manual_seed(seed)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=source)
        optimizer.step()


def move(tensors):
    """New memory for each, the old one spoilt; the old ones, so that nothing takes their place."""
    old = []
    for t in tensors:
        old.append(t.data)
        t.data = t.data.clone()
        old[-1].fill_(float("nan") if t.is_floating_point() else 7)
    return old


@pytest.mark.parametrize("what", ["state", "weights", "both"])
@pytest.mark.parametrize("variant", KEPT)
def test_moved_memory_changes_nothing(variant, what):
    net = make_net()
    optimizer = build_optimizer(net, variant)
    twin, other = copy.deepcopy((net, optimizer))
    steps(net, optimizer, range(3))
    steps(twin, other, range(3))
    tensors = [] if what == "state" else list(net.parameters())
    if what != "weights":
        tensors += [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    old = move(tensors)
    steps(net, optimizer, range(3, 6))
    steps(twin, other, range(3, 6))
    for p, q in zip(net.parameters(), twin.parameters()):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert not torch.is_tensor(value) or torch.equal(value, other.state[q][name])
    assert len(old) == len(tensors)


@pytest.mark.parametrize("variant", KEPT)
def test_state_of_another_size_is_never_read_beyond_its_end(variant, monkeypatch):
    """PyTorch's operators refuse it, or broadcast it; no kernel has it."""
    net = make_net()
    optimizer = build_optimizer(net, variant)
    steps(net, optimizer, range(2))
    for name in ("adamsn", "adafactor"):
        step = getattr(step_cpu.MatrixTable, name)

        def checked(table, *rest, step=step):
            for item in table.items:
                assert item.param is not net["wte"].weight
            step(table, *rest)

        monkeypatch.setattr(step_cpu.MatrixTable, name, checked)
    for value in optimizer.state[net["wte"].weight].values():
        if torch.is_tensor(value):
            value.data = value.data.flatten()[:1].clone()
    with pytest.raises(RuntimeError):
        steps(net, optimizer, range(1))
