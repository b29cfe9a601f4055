"""The CPU kernels of the optimizers against float64 references and the plain loop in PyTorch."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import optimizer_references as reference
import pytest
import torch
from optimizer_references import alike, run
from torch import nn

from leangpt.optim import Adafactor, AdamSN, MuonSN, build_optimizer
from leangpt.optim.kernels import step_cpu
from leangpt.optim.momentum import dequantize, dither
from leangpt.system.cache import cache_folder

ROOT = Path(__file__).resolve().parents[3]
needs_kernels = pytest.mark.skipif(step_cpu.library() is None, reason="needs Linux and cc")
SHAPES = [(24, 10), (1, 7), (1, 1), (33, 1), (5, 96), (300, 67), (4, 2, 3, 5), (1030, 260)]
EXACT = [
    (AdamSN, dict()),
    (AdamSN, dict(norm="sum")),
    (AdamSN, dict(betas=(0.0, 0.99))),
    (AdamSN, dict(betas=(0.95, 0.99), nu1=0.8)),
    (Adafactor, dict()),
    (Adafactor, dict(clip=0.3)),
    (Adafactor, dict(clip=None)),
    (Adafactor, dict(momentum=0.9)),
]


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """The items that the kernels took."""
    items = []
    for name in ("adamsn", "adafactor"):
        step = getattr(step_cpu.MatrixTable, name)
        monkeypatch.setattr(step_cpu.MatrixTable, name, functools.partialmethod(count, step, items))
    return items


def count(stack, step, items, *rest):
    items.extend(stack.items)
    step(stack, *rest)


def matrices(shapes=SHAPES):
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=source)) for s in shapes]


def gradients(shapes=SHAPES, steps=3, size=1.0):
    source = torch.Generator().manual_seed(1)
    return [[size * torch.randn(s, generator=source) for s in shapes] for _ in range(steps)]


def test_they_are_built_where_they_can_be():
    assert (step_cpu.library() is not None) == bool(sys.platform == "linux" and shutil.which("cc"))


NO_COMPILER = {
    "none": None,
    "fails": "echo unknown flag >&2; exit 1",
    "makes rubbish": 'for a; do [ "$o" = -o ] && echo x > "$a"; o=$a; done',
}


@pytest.mark.parametrize("cc", NO_COMPILER)
def test_without_a_compiler_pytorch_does_the_same(cc, tmp_path, monkeypatch, taken, capfd):
    results = []
    for path in (cache_folder(), tmp_path / "cache"):
        monkeypatch.setenv("LEANGPT_CACHE", str(path))
        library = functools.cache(step_cpu.library.__wrapped__)
        monkeypatch.setattr(step_cpu, "library", library)
        results.append(matrices())
        run(AdamSN(results[-1], lr=1e-2), results[-1], gradients())
        if NO_COMPILER[cc] is not None:
            (tmp_path / "cc").write_text(f"#!/bin/sh\n{NO_COMPILER[cc]}\n")
            (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    assert len(taken) in (0, 3 * len(SHAPES))  # the first round's alone
    assert capfd.readouterr() == ("", "")
    for p, q in zip(*results):
        assert torch.allclose(p, q, rtol=2e-5, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.parametrize("nu1", [1.0, 0.8])
@pytest.mark.parametrize(
    "shape, partition", [((24, 10), "row"), ((1, 7), "row"), ((70, 33), "row"), ((9, 96), 32)]
)
def test_adamsn_in_c_follows_the_paper(shape, partition, nu1, norm, taken):
    p = nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape))
    grads = gradients([shape], steps=50)
    expected = reference.adamsn(
        p.detach().double(),
        [g.double() for (g,) in grads],
        reference.subsets(shape, partition),
        1e-2,
        (0.9, 0.98),
        1e-8,
        0.1,
        norm,
        nu1,
    )
    optimizer = AdamSN(
        [p], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1, norm=norm, nu1=nu1, partition=partition
    )
    run(optimizer, [p], grads)
    assert len(taken) == 50 and (p - expected).abs().max() <= 2e-5 * expected.abs().max()


@needs_kernels
@pytest.mark.parametrize("shape", [(24, 10), (1, 7), (70, 33), (600, 40)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [0.7, 1e9])
def test_adafactor_in_c_follows_the_paper(shape, momentum, clip, taken):
    p = nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape))
    grads = gradients([shape], steps=50)
    options = dict(lr=1e-2, beta2=0.97, decay=0.8, clip=clip, weight_decay=0.1, momentum=momentum)
    expected = reference.adafactor(
        p.detach().double(), [g.double() for (g,) in grads], relative_step=False, **options
    )
    run(Adafactor([p], **options), [p], grads)
    assert len(taken) == 50 and (p - expected).abs().max() <= 2e-5 * expected.abs().max()


def both(cls, options, size=1.0):
    """(parameters, optimizer) by the kernels and by the plain loop, rates differing by group."""
    results = []
    for foreach in (True, False):
        params = matrices()
        groups = [dict(params=params[::2], lr=2e-2), dict(params=params[1::2], weight_decay=0.0)]
        optimizer = cls(groups, lr=1e-2, weight_decay=0.1, foreach=foreach, **options)
        run(optimizer, params, gradients(size=size))
        results.append((params, optimizer))
    return results


def check_equal(results):
    (mine, optimizer), (plain, loop) = results
    for p, q in zip(mine, plain):
        assert torch.equal(p.isnan(), q.isnan())
        assert torch.allclose(p, q, rtol=2e-5, atol=2e-5, equal_nan=True)
        assert optimizer.state[p].keys() == loop.state[q].keys()
        for name, value in optimizer.state[p].items():
            if torch.is_tensor(value):
                other = loop.state[q][name]
                assert value.shape == other.shape and value.dtype == other.dtype
                assert alike(value, other), name


@needs_kernels
@pytest.mark.parametrize("cls, options", EXACT)
@pytest.mark.parametrize("maximize", [False, True])
def test_c_equals_the_loop(cls, options, maximize, taken):
    check_equal(both(cls, options | {"maximize": maximize}))
    assert len(taken) == 3 * len(SHAPES)


@needs_kernels
@pytest.mark.parametrize("cls, options", EXACT)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e18, 1e37, float("nan"), float("inf")])
def test_c_equals_the_loop_for_odd_gradients(cls, options, size, taken):
    results = both(cls, options, size)
    assert len(taken) == 3 * len(SHAPES)
    if size < 1e30:
        check_equal(results)
    for p, q in zip(results[0][0], results[1][0]):
        assert torch.equal(p.isfinite(), q.isfinite())
        assert p.isfinite().all() == (size < 1e38)


@needs_kernels
def test_one_nan_spoils_what_it_touches_and_no_more(taken):
    for cls, options in EXACT:
        results = []
        for foreach in (True, False):
            p = nn.Parameter(torch.ones(40, 50))
            grads = gradients([(40, 50)])
            grads[1][0][3, 4] = float("nan")
            run(cls([p], lr=1e-2, foreach=foreach, **options), [p], grads)
            results.append(p.detach())
        assert torch.equal(results[0].isnan(), results[1].isnan())
        assert results[0].isnan().any()


@needs_kernels
@pytest.mark.parametrize(
    "cls, options", [(AdamSN, {}), (AdamSN, dict(partition=32)), (Adafactor, dict(momentum=0.9))]
)
@pytest.mark.parametrize("shape", [(1, 32), (33, 96), (3, 2, 4, 8), (300, 544)])
@pytest.mark.parametrize("size", [1.0, 0.0, 1e-37, 1e18])
def test_8_bit_codes_are_dithered_as_pytorch_has_it(cls, options, shape, size, taken):
    """Scales as PyTorch's; what is read back is off by half a code, evenly spread."""
    kept = []
    for foreach in (True, False):
        p, stored = nn.Parameter(torch.ones(shape)), torch.zeros(shape)
        optimizer = cls([p], lr=0.0, momentum_bits=8, foreach=foreach, **options)
        exact = cls([q := nn.Parameter(torch.ones(shape))], lr=0.0, foreach=False, **options)
        for step, grads in enumerate(gradients([shape], size=size)):
            if step:
                exact.state[q]["momentum"].copy_(stored)  # what this step starts from
            run(optimizer, [p], [grads])
            run(exact, [q], [grads])
            wanted = exact.state[q]["momentum"].view(-1, 32)
            codes, scales = (optimizer.state[p][k] for k in ("momentum", "momentum_scale"))
            rounded_up = (wanted.abs().amax(1, keepdim=True) * ((1 + 2**-7) / 127)).bfloat16()
            assert torch.allclose(scales.float(), rounded_up.float(), rtol=2**-7, atol=1e-40)
            ideal = wanted / scales.float().clamp_min(torch.finfo(torch.float32).tiny)
            assert torch.equal(codes == -128, wanted == 0)
            error = torch.where(codes == -128, 0, codes - dither(scales, step + 1)) - ideal
            assert error.abs().max() <= 0.5001
            if size == 1.0 and codes.numel() > 1000:
                assert error.mean().abs() < 4 * (1 / 12 / codes.numel()) ** 0.5
                assert abs(12 * error.square().mean() - 1) < 4 * (0.8 / codes.numel()) ** 0.5
            stored = dequantize(codes[None], scales[None], step + 1, torch.Size((1, *shape)))[0]
        kept.append(optimizer.state[p])
    assert len(taken) == 3
    apart = (kept[0]["momentum"] - kept[1]["momentum"].float()).abs()
    assert apart.max() <= 2 and apart.mean() < 0.01  # sums in another order tip a code over


@needs_kernels
@pytest.mark.parametrize("partition", ["row", 32])
def test_8_bit_weights_are_the_loops(partition, taken):
    results = []
    for foreach in (True, False):
        params = matrices([(33, 96), (1, 32), (5, 1056)])
        optimizer = AdamSN(
            params,
            lr=1e-2,
            betas=(0.95, 0.99),
            nu1=0.8,
            weight_decay=0.1,
            momentum_bits=8,
            partition=partition,
            foreach=foreach,
        )
        run(optimizer, params, gradients([(33, 96), (1, 32), (5, 1056)], steps=2))
        results.append(params)
    assert len(taken) == 2 * 3
    for p, q in zip(*results):
        assert torch.allclose(p, q, rtol=2e-4, atol=2e-4)  # a code tipped over is 1/127 of a step


@needs_kernels
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 3e38])
def test_8_bit_momentum_of_odd_gradients_spoils_no_other_block(odd, taken):
    results = []
    for foreach in (True, False):
        p, grad = nn.Parameter(torch.ones(4, 96)), torch.ones(4, 96)
        grad[1, 40] = odd
        optimizer = AdamSN([p], lr=1e-2, momentum_bits=8, foreach=foreach)
        run(optimizer, [p], [[grad]])
        codes = optimizer.state[p]["momentum"]  # (blocks, 32); all of others' gradients are 1
        results.append((p, codes))
        assert (codes[[i for i in range(12) if i != 4]] >= 126).all()
    (p, codes), (q, _) = results
    assert torch.equal(p.isfinite(), q.isfinite()) and codes.abs().max() <= 127
    assert len(taken) == 1


@needs_kernels
@pytest.mark.parametrize(
    "cls, options",
    [
        (AdamSN, {}),
        (AdamSN, dict(momentum_bits=8)),
        (AdamSN, dict(momentum_bits=8, partition=32)),
        (Adafactor, {}),
        (Adafactor, dict(momentum=0.5)),
        (Adafactor, dict(momentum=0.5, momentum_bits=8)),
    ],
)
def test_bits_do_not_depend_on_the_threads(cls, options, taken):
    results, before = [], torch.get_num_threads()
    shapes = [(300, 64), (1030, 256), (7, 32)]
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            params = matrices(shapes)
            run(cls(params, lr=1e-2, **options), params, gradients(shapes))
            results.append(params)
    finally:
        torch.set_num_threads(before)
    assert len(taken) == 4 * 3 * len(shapes)
    for params in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], params))


RESUME = """
import ast, sys, torch
from leangpt.optim import build_optimizer
saved = torch.load(sys.argv[1], weights_only=True)
net = torch.nn.Linear(64, 50)
net.load_state_dict(saved["net"])
optimizer = build_optimizer(net, sys.argv[2], **ast.literal_eval(sys.argv[3]))
optimizer.load_state_dict(saved["optimizer"])
for weight, bias in saved["grads"]:
    net.weight.grad, net.bias.grad = weight, bias
    optimizer.step()
torch.save(net.state_dict(), sys.argv[1] + ".out")
"""


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(
    "variant, options",
    [
        ("adamsn", {}),
        ("adamsn8", {}),
        ("adafactor", {}),
        ("adafactor", dict(momentum=0.8, momentum_bits=8)),
    ],
)
def test_resuming_in_another_process_is_bitwise(variant, options, tmp_path, taken):
    net, grads = nn.Linear(64, 50), gradients([(50, 64), (50,)], steps=6)
    optimizer = build_optimizer(net, variant, **options)
    params, file = [net.weight, net.bias], str(tmp_path / "state.pt")
    run(optimizer, params, grads[:3])
    saved = dict(net=net.state_dict(), optimizer=optimizer.state_dict(), grads=grads[3:])
    torch.save(saved, file)
    run(optimizer, params, grads[3:])
    assert len(taken) == 6
    subprocess.run(
        [sys.executable, "-c", RESUME, file, variant, repr(options)], cwd=ROOT, check=True
    )
    for name, value in torch.load(file + ".out").items():
        assert torch.equal(value, net.state_dict()[name])


@needs_kernels
def test_c_leaves_to_pytorch_what_it_does_not_know(taken):
    for p, options in (
        (torch.ones(64), {}),
        (torch.ones(0, 64), {}),
        (torch.ones(4, 0), {}),
        (torch.ones(64, 6).t(), {}),
        (torch.ones(6, 64, dtype=torch.float64), {}),
        (torch.ones(6, 64, dtype=torch.bfloat16), {}),
        (torch.ones(3, 2, 2, 2).to(memory_format=torch.channels_last), {}),
        (torch.ones(6, 40), dict(momentum_bits=8)),
        (torch.ones(6, 64), dict(momentum_bits=4)),
        (torch.ones(6, 64), dict(update_clip=1.0)),
        (torch.ones(6, 64), dict(foreach=False)),
        (torch.ones(64, 6), dict(partition="larger")),
        (torch.ones(6, 64), dict(partition=16)),
        (torch.ones(6, 80), dict(partition=32)),
        (torch.ones(6, 64), dict(lr=torch.tensor(1e-2))),
    ):
        p = nn.Parameter(p)
        p.grad = torch.ones_like(p)
        AdamSN([p], **({"lr": 0.1} | options)).step()
        assert not taken and bool((p != 1).all())
    p = nn.Parameter(torch.ones(6, 64))
    p.grad = torch.ones(64, 6).t()
    AdamSN([p]).step()
    Adafactor([p], relative_step=True).step()
    Adafactor([p], factored=False).step()
    MuonSN([p]).step()
    assert not taken


@needs_kernels
def test_c_follows_changes(taken):
    """New rates, other settings, moved gradients, a parameter that sits out, a loaded state."""

    def changing(foreach):
        params, grads = matrices([(6, 64)] * 3), gradients([(6, 64)] * 3, steps=7)
        optimizer = AdamSN(params, lr=1e-2, foreach=foreach)
        run(optimizer, params, grads[:2])
        optimizer.param_groups[0]["lr"] = 5e-3
        run(optimizer, params, grads[2:3])
        optimizer.param_groups[0] |= dict(betas=(0.8, 0.9), weight_decay=0.3)
        run(optimizer, params, grads[3:4])
        params[1].grad = None
        optimizer.step()  # its step count now lags behind the others'
        run(optimizer, params, grads[4:6])
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, params, grads[6:])
        return params

    for p, q in zip(changing(True), changing(False)):
        assert torch.allclose(p, q, rtol=2e-5, atol=2e-5)
    assert len(taken) == 3 * 7 + 2
