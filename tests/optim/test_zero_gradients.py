"""A weight whose gradient has always been zero does not move: every variant, every kernel."""

import pytest
import torch
from torch import nn

from leangpt.optim import VARIANTS, build_optimizer

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


class WithDeadUnits(nn.Module):
    """A network of which some inputs are always zero, some hidden units never fire, and some rows
    of an embedding are never looked up."""

    def __init__(self, width=256):
        super().__init__()
        self.table = nn.Embedding(40, width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, width), "c_proj": nn.Linear(width, 64)})
        self.live = torch.rand(width) < 0.7

    def forward(self, idx):
        x = self.table(idx) * self.live.to(idx.device)
        x = self.mlp["c_fc"](x) * self.live.to(idx.device)
        return self.mlp["c_proj"](x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_never_had_a_gradient_does_not_move(variant, param_dtype, device):
    torch.manual_seed(0)
    model = WithDeadUnits().to(device, param_dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, variant, learning_rate=1e-2, weight_decay=0.0)
    for _ in range(30):
        idx = torch.randint(30, (64,), device=device)  # of 40 rows
        model(idx).float().square().mean().backward()
        for name, p in model.named_parameters():
            touched[name] |= p.grad != 0
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        still = ~touched[name]
        if name.startswith("mlp") and p.ndim == 2:  # orthogonalising mixes within live columns
            still = ~touched[name].any(0, keepdim=True).expand_as(p)
            assert still.any()
        assert torch.equal(p[still], before[name][still]), name
        assert not torch.equal(p, before[name]), name
