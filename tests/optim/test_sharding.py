"""Rows sharded over two gloo processes (FSDP2): the same weights as one process gives."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import failures_of

from leangpt.optim import Adafactor, AdamSN, MuonSN, state_bytes
from leangpt.optim.momentum import dequantize
from leangpt.system.errors import UserError

CASES = {
    "row": (AdamSN, dict(partition="row")),
    "quasi-hyperbolic": (AdamSN, dict(betas=(0.95, 0.99), nu1=0.8)),
    "larger": (AdamSN, dict(partition="larger")),
    "sum": (AdamSN, dict(partition="larger", norm="sum")),
    "element": (AdamSN, dict(partition="element", update_clip=0.5)),
    "runs": (AdamSN, dict(partition=3)),
    "adafactor": (Adafactor, dict()),
    "adafactor with momentum": (Adafactor, dict(momentum=0.9, relative_step=True)),
    "muonsn": (MuonSN, dict()),
}


def make_net():
    torch.manual_seed(0)  # 9 and 5 rows: shards of unequal size; one vector of a single number
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1))


def train(net, case, steps=4):
    cls, options = CASES[case]
    optimizer = cls(net.parameters(), lr=1e-2, weight_decay=0.1, **options)
    for i in range(steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def work(rank, failures):
    from torch.distributed.fsdp import fully_shard

    for case in CASES:
        plain, net = make_net(), make_net()
        expected = train(plain, case)
        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        optimizer = train(net, case)
        for (name, p), q in zip(net.named_parameters(), plain.parameters()):
            if not torch.allclose(p.full_tensor(), q, atol=2e-6):
                worst = (p.full_tensor() - q).abs().max().item()
                failures.append(f"{case} {name} rank {rank}: differs by {worst}")
            for key, value in optimizer.state[p].items():
                if torch.is_tensor(value):
                    whole = expected.state[q][key]
                    if not torch.allclose(value.full_tensor(), whole, atol=2e-6):
                        failures.append(f"{case} {name} state {key} rank {rank}")
        other = train(make_net(), case)  # bytes: a share of the rows each
        if not state_bytes(optimizer) < state_bytes(other):
            failures.append(f"{case}: state is not sharded")
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
    check_quantized(rank, failures)


def check_quantized(rank, failures):
    """Codes are sharded by whole rows, so their parts make up the momentum; other shapes are
    refused when saved, not saved wrongly."""
    from torch.distributed.fsdp import fully_shard

    for rows, bits in ((9, 8), (64, 4), (1, 8)):
        net = nn.Linear(64, rows, bias=False)
        torch.nn.init.ones_(net.weight)
        fully_shard(net, mesh=dist.init_device_mesh("cpu", (2,)))
        optimizer = AdamSN(net.parameters(), lr=1e-2, momentum_bits=bits)
        exact = torch.zeros(rows, 64)
        for step in range(3):
            grad = torch.randn(rows, 64, generator=torch.Generator().manual_seed(step))
            net(torch.eye(64)).mul(grad.T).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            exact.lerp_(grad, 0.1)
        before = optimizer.state_dict()
        optimizer.load_state_dict(before)
        state = optimizer.state_dict()["state"][0]
        codes, scales = (state[k].full_tensor() for k in ("momentum", "momentum_scale"))
        if codes.shape != (rows, 2, 32 * bits // 8) or scales.shape != (rows, 2, 1):
            failures.append(f"codes of {rows} rows have shape {tuple(codes.shape)}")
        shape = torch.Size((1, rows, 64))
        read = dequantize(codes.flatten(0, 1)[None], scales.flatten(0, 1)[None], 3, shape)
        width = scales.float().max().item()
        if not (read[0] - exact).abs().max() <= 1.4 * width:  # half a code, thrice
            failures.append(f"{bits}-bit momentum of {rows} rows, rank {rank}")
    net = fully_shard(nn.Linear(40, 8, bias=False), mesh=dist.init_device_mesh("cpu", (2,)))
    optimizer = AdamSN(net.parameters(), momentum_bits=8)
    net(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    try:
        optimizer.state_dict()
        failures.append("codes that span rows were saved")
    except UserError:
        pass
    group = dict(params=list(net.parameters()), transposed=True)
    try:
        AdamSN([group]).step()
        failures.append("weights stored (in, out) were updated by rows")
    except UserError:
        pass


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_sharded_training_equals_one_process():
    assert not failures_of(work)


def test_other_placements_are_refused():
    from leangpt.optim.sharded.rows import RowShards

    class Placement:
        def is_replicate(self):
            return False

        def is_shard(self, dim=None):
            return dim != 0

    class Columns:
        device_mesh, placements = None, (Placement(),)

    with pytest.raises(UserError, match="only rows may be sharded"):
        RowShards(Columns())
