"""A weight whose gradient has always been zero does not move: every variant, every kernel.

CUDA's kernels run here on a GPU, or with TRITON_INTERPRET=1 where Triton is installed.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import failures_of

from leangpt.optim import VARIANTS, build_optimizer
from leangpt.optim.kernels import step_cpu, step_cuda

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
WAYS = {  # to make a step -> options of the optimizer
    "kernels": {},
    "plain": {"foreach": False},
    "inside backward": {"fused_backward": True},
}
RECIPES = {name: (name, {}) for name in VARIANTS} | {
    "adamsn in 4 bits": ("adamsn", {"momentum_bits": 4}),
    "muonsn in 16 bits": ("muonsn", {"momentum_bits": 16}),
    "muonsn8, columns as they are": ("muonsn8", {"column_norm": False}),
    "adafactor with momentum": ("adafactor", {"momentum": 0.9, "momentum_bits": 8}),
}
IN_C = ("adamsn", "adamsn8", "adafactor", "adafactor with momentum")  # linear weights, in float32


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


@pytest.fixture
def taken(monkeypatch):
    """The weights that kernels took; small ones go to CUDA's too."""
    monkeypatch.setattr(step_cuda, "LEAST", 0)
    shapes = set()
    for module in (step_cuda, step_cpu):
        stacks_of = module.stacks_of

        def noted(items, most, stacks_of=stacks_of):
            stacks = stacks_of(items, most)
            shapes.update(tuple(i.param.shape) for stack in stacks for i in stack.items)
            return stacks

        monkeypatch.setattr(module, "stacks_of", noted)
    return shapes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "param_dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_never_had_a_gradient_does_not_move(recipe, way, param_dtype, device, taken):
    variant, options = RECIPES[recipe]
    if variant == "adam" and way != "kernels":
        pytest.skip("torch's own AdamW")
    torch.manual_seed(0)
    model = WithDeadUnits().to(device, param_dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    note_gradients(model, touched)
    optimizer = build_optimizer(
        model, variant, learning_rate=1e-2, weight_decay=0.0, **WAYS[way], **options
    )
    for _ in range(30):
        idx = torch.randint(30, (64,), device=device)  # of 40 rows
        model(idx).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not moved_unasked(model, before, touched)
    if way == "plain":
        assert not taken
    if way == "kernels" and recipe in IN_C and step_cpu.library():
        assert (256, 256) in taken or (device, param_dtype) != ("cpu", torch.float32)


def note_gradients(model, touched):
    """Mark in `touched` what has a gradient, before an optimizer's own hooks take it."""

    def note(grad, name):
        touched[name] |= grad != 0

    for name, p in model.named_parameters():
        p.register_hook(functools.partial(note, name=name))


def moved_unasked(model, before, touched) -> list[str]:
    """Names of weights that moved where no gradient had been, or that never moved at all."""
    wrong = []
    for name, p in model.named_parameters():
        still = ~touched[name]
        if name.startswith("mlp") and p.ndim == 2:  # orthogonalising mixes within live columns
            still = ~touched[name].any(0, keepdim=True).expand_as(p)
            assert still.any()
        if not torch.equal(p[still], before[name][still]) or torch.equal(p, before[name]):
            wrong.append(name)
    return wrong


def train_sharded(rank, failures):
    """Every recipe on two shards: what belongs to dead units stays, and something moves."""
    from torch.distributed.fsdp import fully_shard

    for recipe, (variant, options) in RECIPES.items():
        torch.manual_seed(0)
        model = WithDeadUnits(width=64)
        dead = ~model.live
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
        optimizer = build_optimizer(model, variant, learning_rate=1e-2, weight_decay=0.0, **options)
        for _ in range(10):
            model(torch.randint(30, (64,))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, p in model.named_parameters():
            p, old = p.full_tensor().detach(), before[name]
            still = torch.zeros_like(p, dtype=torch.bool)
            if p.ndim == 2:
                still[:, dead] = True
            if name == "table.weight":
                still[30:] = True
            if name == "mlp.c_fc.bias":
                still[dead] = True
            if not torch.equal(p[still], old[still]) or torch.equal(p, old):
                failures.append(f"{recipe}: {name}, rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_nor_does_a_share_of_it_on_several_processes():
    assert not failures_of(train_sharded)
