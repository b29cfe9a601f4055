"""Low-byte training in two real processes (gloo): what is refused, and what works sharded."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import failures_of

from leangpt.optim import build_optimizer
from leangpt.system.errors import UserError

BEFORE_THE_REDUCTION = "DDP reduces too late"


def make_net(shard):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64))
    if shard:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=dist.init_device_mesh("cpu", (2,)))
    return net


def refusal(shard):
    """What building an optimizer that updates inside backward says, if anything."""
    try:
        build_optimizer(make_net(shard), "adamsn8", fused_backward=True)
    except UserError as error:
        return str(error)


def trained(net, variant, steps=5):
    optimizer = build_optimizer(net, variant, learning_rate=1e-2, embedding_lr=1e-2)
    for i in range(steps):
        x = torch.randn(512, 8, generator=torch.Generator().manual_seed(i))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def work(rank, failures):
    if not refusal(False).endswith(BEFORE_THE_REDUCTION) or refusal(True):
        failures.append(f"rank {rank}: {refusal(False)}, {refusal(True)}")
    for variant in ("adamsn8", "muonsn8"):
        exact, plain, net = make_net(False), make_net(False), make_net(True)
        trained(exact, variant.removesuffix("8"))
        trained(plain, variant)
        state = trained(net, variant).state[net[2].weight]
        momentum = state["momentum"].to_local()
        if momentum.numel() != 64 * 64 // 2:  # bytes: this rank's half of the rows
            failures.append(f"rank {rank}, {variant}: {momentum.shape} of momentum")
        # each rank draws its own rounding: as far from one process as that is from no rounding
        rounding = (plain[2].weight - exact[2].weight).norm()
        difference = (net[2].weight.full_tensor() - plain[2].weight).norm()
        if not difference < 2 * rounding:
            failures.append(f"rank {rank}, {variant}: {difference}, rounding {rounding}")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes():
    assert not failures_of(work)
