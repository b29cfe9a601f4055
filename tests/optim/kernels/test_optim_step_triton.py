"""The CUDA kernels of the optimizers against the plain loop in PyTorch.

On a GPU: `pytest tests/optim/kernels`. Without one, where Triton is installed:
`TRITON_INTERPRET=1 pytest tests/optim/kernels`.
"""

import functools

import pytest
import torch
from optimizer_references import alike
from torch import nn

from leangpt.optim import Adafactor, AdamSN, MuonSN
from leangpt.optim.kernels import step_cuda
from leangpt.optim.momentum import dequantize
from leangpt.system.triton import AVAILABLE, INTERPRETED

pytestmark = pytest.mark.skipif(
    not AVAILABLE, reason="needs CUDA, or Triton and TRITON_INTERPRET=1"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Small matrices go to the kernels too; counts the tensors that they took."""
    monkeypatch.setattr(step_cuda, "LEAST", 0)
    taken = []
    for name in ("adamsn", "adafactor", "muonsn"):
        counted = functools.partial(count, taken, getattr(step_cuda, name))
        monkeypatch.setattr(step_cuda, name, counted)
    return taken


def count(taken, launch, stack, *rest):
    taken.extend(stack.items)
    launch(stack, *rest)


def matrices(shapes, dtype=F32, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=source).to(DEVICE, dtype)) for s in shapes]


def steps(optimizer, params, number, seed=1, size=1.0):
    source = torch.Generator().manual_seed(seed)
    for _ in range(number):
        for p in params:
            grad = size * torch.randn(p.shape, generator=source)
            p.grad = grad.to(DEVICE, p.dtype)
        optimizer.step()


SHAPES = [(6, 64), (6, 64), (5, 96), (4, 2, 32)]


def both(cls, options, shapes=SHAPES, dtype=F32, size=1.0):
    """(parameters and optimizer) by the kernels and by the plain loop."""
    results = []
    for foreach in (True, False):
        params = matrices(shapes, dtype)
        groups = [dict(params=params[:1], lr=2e-2), dict(params=params[1:])]
        optimizer = cls(groups, lr=1e-2, weight_decay=0.1, foreach=foreach, **options)
        if dtype == BF16:
            for group in optimizer.param_groups:
                group["stochastic_rounding"] = False
        steps(optimizer, params, 3, size=size)
        results.append((params, optimizer))
    return results


def check(results, tolerance, launches, taken):
    (mine, optimizer), (plain, reference) = results
    assert len(launches) == taken
    for p, q in zip(mine, plain):
        assert p.isfinite().all()
        assert torch.allclose(p.float(), q.float(), rtol=tolerance, atol=tolerance)
        for name, value in optimizer.state[p].items():
            if torch.is_tensor(value) and value.dtype == F32 and tolerance < 1e-3:
                assert alike(value, reference.state[q][name]), name


QUASI = dict(betas=(0.95, 0.99), nu1=0.8)
ADAMSN = [
    dict(),
    dict(norm="sum"),
    dict(betas=(0.0, 0.99)),
    dict(partition=32),
    dict(partition=32, norm="sum"),
    QUASI,
    QUASI | dict(partition=32),
]
ADAFACTOR = [dict(), dict(clip=0.3), dict(clip=None), dict(momentum=0.9)]
MUONSN = [
    dict(),
    dict(nu=1.0),
    dict(momentum=0.0),
    dict(row_blocks=(2, 2, 2)),
    dict(row_blocks=(3, 1, 2)),
]
EXACT = [(AdamSN, o) for o in ADAMSN] + [(Adafactor, o) for o in ADAFACTOR]


@pytest.mark.parametrize("cls, options", EXACT)
@pytest.mark.parametrize("maximize", [False, True])
def test_triton_equals_the_loop(cls, options, maximize, launches):
    results = both(cls, options | {"maximize": maximize})
    check(results, 2e-5, launches, 3 * len(SHAPES))


@pytest.mark.parametrize("options", MUONSN)
def test_triton_muonsn_equals_the_loop(options, launches):
    # on CUDA both orthogonalise in bfloat16, but round different inputs
    check(both(MuonSN, options), 5e-5 if DEVICE == "cpu" else 2e-3, launches, 3 * len(SHAPES))


@pytest.mark.parametrize("cls, options", [(AdamSN, {}), (Adafactor, {}), (MuonSN, {})])
def test_triton_takes_bfloat16(cls, options, launches):
    check(both(cls, options, dtype=BF16), 2e-2, launches, 3 * len(SHAPES))


@pytest.mark.parametrize("cls, options", [(AdamSN, {}), (Adafactor, {})])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e18, 1e37])
def test_triton_keeps_weights_finite(cls, options, size, launches):
    (params, _), _ = both(cls, options, size=size)
    assert launches and all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("shape", [(70, 64), (33, 1056)])
def test_triton_adafactor_over_many_tiles(shape, launches):
    check(both(Adafactor, {}, [shape, shape]), 2e-5, launches, 6)


def stored(optimizer, p):
    state = optimizer.state[p]
    codes = state["momentum"]
    if codes.dtype in (F32, BF16):
        return codes.float()
    scales, shape = state["momentum_scale"][None], torch.Size((1, *p.shape))
    return dequantize(codes[None], scales, state["step"], shape)[0]


@pytest.mark.parametrize("cls", [AdamSN, Adafactor, MuonSN])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_triton_rounds_momentum_without_bias(cls, bits, launches):
    """What is stored after two steps is the unrounded momentum but for two roundings."""
    options = dict(momentum=0.9) if cls is not AdamSN else {}
    kept = []
    for momentum_bits in (32, bits):
        (p,) = matrices([(8, 1024)])
        optimizer = cls([p], momentum_bits=momentum_bits, **options)
        steps(optimizer, [p], 2)
        kept.append(stored(optimizer, p).view(-1, 32))
    exact, read = kept
    assert len(launches) == 4
    width = exact.abs().amax(1, keepdim=True) * {16: 2**-8, 8: 1 / 127.5, 4: 1 / 7.5}[bits]
    error = (read - exact) / width
    assert 0.4 < error.abs().max() <= (2.5 if bits == 16 else 1.3)
    if bits < 16:  # each error uniform within half a code; a wrong dither would double this
        assert 0.7 < error.square().mean() * 12 / 1.81 < 1.3
    assert error.mean().abs() <= 4 * 0.4 / error.numel() ** 0.5


@pytest.mark.parametrize("bits", [8, 4])
def test_triton_writes_the_codes_of_the_loop(bits, launches):
    states = []
    for foreach in (True, False):
        (p,) = matrices([(8, 1024)])
        optimizer = AdamSN([p], momentum_bits=bits, foreach=foreach)
        steps(optimizer, [p], 1)
        states.append([optimizer.state[p][k] for k in ("momentum", "momentum_scale")])
    (mine, scales), (loop, wanted) = states
    same = (scales == wanted).flatten()  # Triton's interpreter rounds bfloat16 towards zero
    assert len(launches) == 1 and same.float().mean() > (0.3 if DEVICE == "cpu" else 0.99)
    assert (mine != loop)[same].float().mean() < 0.001  # a last bit may tip a code over


def test_triton_rounds_weights_without_bias(launches):
    p = nn.Parameter(torch.ones(8, 1024, dtype=BF16, device=DEVICE))
    optimizer = AdamSN([p], lr=4e-4)
    for _ in range(10):
        p.grad = torch.ones_like(p)
        optimizer.step()
    moved = (1 - p.detach().float().mean()) / (10 * 4e-4)
    assert len(launches) == 10 and abs(moved - 1) < 0.05


@pytest.mark.parametrize(
    "cls, options",
    [
        (AdamSN, dict(momentum_bits=8)),
        (AdamSN, dict(momentum_bits=8, partition=32)),
        (Adafactor, dict(momentum=0.9, momentum_bits=4)),
        (MuonSN, dict(momentum_bits=4)),
    ],
)
def test_triton_resumes_bit_by_bit(cls, options, launches):
    params = matrices(SHAPES, BF16)
    optimizer = cls(params, lr=1e-2, **options)
    steps(optimizer, params, 2)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = cls(twins, lr=1e-2, **options)
    state = optimizer.state_dict()
    other.load_state_dict(
        torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state)
    )
    for each, owner in ((params, optimizer), (twins, other)):
        steps(owner, each, 2, seed=7)
    assert len(launches) == 6 * len(SHAPES)
    for p, q in zip(params, twins):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert not torch.is_tensor(value) or torch.equal(value, other.state[q][name])


def test_triton_leaves_to_pytorch_what_it_does_not_know(launches):
    for p, options in (
        (torch.ones(6, 40), {}),  # rows that are not whole blocks of 32
        (torch.ones(64, 6).t(), {}),
        (torch.ones(6, 64, dtype=torch.float16), {}),
        (torch.ones(6, 64, dtype=torch.float64), {}),
        (torch.ones(64), {}),
        (torch.ones(0, 64), {}),
        (torch.ones(6, 64), dict(update_clip=1.0)),
        (torch.ones(6, 64), dict(foreach=False)),
        (torch.ones(64, 32), dict(partition="larger")),
        (torch.ones(6, 64), dict(lr=torch.tensor(1e-2))),
    ):
        p = nn.Parameter(p.to(DEVICE))
        p.grad = torch.ones_like(p)
        AdamSN([p], **options).step()
        assert not launches and bool((p != 1).all())


def test_triton_plans_follow_changes(launches):
    """New rates, other settings, moved gradients, a parameter that sits out, a loaded state."""

    def run(foreach):
        params = matrices([(6, 64)] * 3)
        optimizer = AdamSN(params, lr=1e-2, foreach=foreach)
        steps(optimizer, params, 2)
        optimizer.param_groups[0]["lr"] = 5e-3
        steps(optimizer, params, 1, seed=2)
        optimizer.param_groups[0] |= dict(betas=(0.8, 0.9), weight_decay=0.3)
        steps(optimizer, params, 1, seed=3)
        params[1].grad = None
        optimizer.step()  # its step count now lags behind the others'
        steps(optimizer, params, 2, seed=4)
        optimizer.load_state_dict(optimizer.state_dict())
        steps(optimizer, params, 1, seed=5)
        return params

    for p, q in zip(run(True), run(False)):
        assert torch.allclose(p, q, rtol=2e-5, atol=2e-5)
    assert len(launches) == 3 * 7 + 2
