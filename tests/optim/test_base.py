"""Each optimizer as a drop-in torch.optim.Optimizer: states, copies, closures, odd input."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optimizer_references import LARGE, gradients, run
from torch import nn

from leangpt.optim import Adafactor, AdamSN, MuonSN
from leangpt.system.errors import UserError

CLASSES = [
    (AdamSN, dict(partition="row")),
    (AdamSN, dict(betas=(0.95, 0.99), nu1=0.8, momentum_bits=8)),
    (AdamSN, dict(partition="larger", momentum_bits=8)),
    (Adafactor, dict()),
    (Adafactor, dict(momentum=0.9, momentum_bits=16)),
    (Adafactor, dict(relative_step=True)),
    (MuonSN, dict()),
    (MuonSN, dict(momentum_bits=4)),
    (MuonSN, dict(momentum=0.0)),
]
each_class = pytest.mark.parametrize("cls, options", CLASSES)


def mixed_params():
    """Vectors, matrices, four dimensions, nothing, a scalar, other dtypes, other strides."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 4), (6, 4), (5,), (4, 6), (3, 2, 2, 2), (0,), (0, 4), (4, 0), (), (2050, 128)]
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    params.append(nn.Parameter(torch.randn(6, 4, generator=generator).double()))
    params.append(nn.Parameter(torch.randn(6, 4, generator=generator).bfloat16()))
    params.append(nn.Parameter(torch.randn(4, 6, generator=generator).t()))
    image = torch.randn(3, 2, 2, 2, generator=generator)
    params.append(nn.Parameter(image.to(memory_format=torch.channels_last)))
    return params


def mixed_gradients(steps=6):
    return [[torch.randn(p.shape) for p in mixed_params()] for _ in range(steps)]


@each_class
def test_foreach_equals_the_loop(cls, options):
    torch.manual_seed(0)
    grads = mixed_gradients()
    bits = options.get("momentum_bits", 32)
    results = []
    for foreach in (True, False):
        params = mixed_params()
        groups = [  # groups of different rates share their stacks
            dict(params=params[::2], lr=1e-2),
            dict(params=params[1::2], weight_decay=0.0),
        ]
        optimizer = cls(groups, lr=3e-3, weight_decay=0.1, foreach=foreach, **options)
        run(optimizer, params, grads)
        assert all(p.isfinite().all() for p in params)
        results.append(params)
    for a, b in zip(*results):
        # rounded momenta draw their noise in another order: equal in size, not in value
        tolerance = 1e-5 if bits == 32 and a.dtype != torch.bfloat16 else 5e-2
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@each_class
def test_state_dict_round_trip_is_bitwise(cls, options):
    torch.manual_seed(0)
    grads = mixed_gradients()
    params = mixed_params()
    optimizer = cls(params, lr=1e-2, weight_decay=0.1, **options)
    run(optimizer, params, grads[:3])
    buffer = io.BytesIO()
    torch.save({"o": optimizer.state_dict(), "p": [p.detach() for p in params]}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twins = [nn.Parameter(p.clone()) for p in saved["p"]]
    other = cls(twins, lr=1.0, **options)
    other.load_state_dict(saved["o"])
    for p, q in zip(params, twins):
        for name, value in optimizer.state[p].items():
            if torch.is_tensor(value):
                assert other.state[q][name].dtype == value.dtype
                assert torch.equal(other.state[q][name], value)
    run(optimizer, params, grads[3:])
    run(other, twins, grads[3:])
    assert all(torch.equal(p, q) for p, q in zip(params, twins))


@each_class
def test_deepcopy_goes_on_alike(cls, options):
    torch.manual_seed(0)
    grads = mixed_gradients()
    params = mixed_params()
    optimizer = cls(params, lr=1e-2, **options)
    run(optimizer, params, grads[:2])
    twin = copy.deepcopy(optimizer)
    run(optimizer, params, grads[2:])
    run(twin, [p for g in twin.param_groups for p in g["params"]], grads[2:])
    for p, q in zip(params, twin.param_groups[0]["params"]):
        assert torch.equal(p, q)


@each_class
def test_tensor_lr_closure_and_maximize(cls, options):
    torch.manual_seed(0)
    start, target = torch.randn(6, 4), torch.randn(6, 4)

    def minimise(lr, sign=1.0, closure=False, **more):
        p = nn.Parameter(start.clone())
        optimizer = cls([p], lr=lr, **options, **more)

        def loss():
            optimizer.zero_grad()
            value = sign * (p - target).square().sum()
            value.backward()
            return value

        for _ in range(20):
            if closure:
                with torch.no_grad():  # the closure runs with gradients all the same
                    value = optimizer.step(loss)
                assert value.requires_grad
            else:
                loss()
                optimizer.step()
        return p.detach()

    plain = minimise(3e-2)
    assert (plain - target).norm() < (start - target).norm()
    assert torch.equal(minimise(3e-2, closure=True), plain)
    assert torch.equal(minimise(3e-2, sign=-1.0, maximize=True), plain)
    assert torch.allclose(minimise(torch.tensor(3e-2)), plain, atol=1e-6)


@each_class
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e20, 1e37])
def test_zero_and_huge_gradients_leave_finite_weights(cls, options, size):
    p, q = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(5))
    optimizer = cls([p, q], lr=1e-2, **options)
    torch.manual_seed(0)
    run(optimizer, [p, q], [[size * torch.randn(6, 4), size * torch.randn(5)] for _ in range(3)])
    run(optimizer, [p, q], [[torch.randn(6, 4), torch.randn(5)] for _ in range(3)])
    assert p.isfinite().all() and q.isfinite().all()


def test_gradients_are_not_touched():
    for cls, options in CLASSES:
        for shape in ((6, 4), LARGE):
            p = nn.Parameter(torch.ones(shape))
            p.grad = torch.randn(shape)
            before = p.grad.clone()
            cls([p], lr=1e-2, weight_decay=0.1, update_clip=0.01, **options).step()
            assert torch.equal(p.grad, before)


@pytest.mark.parametrize(
    "cls, options, words",
    [
        (AdamSN, dict(lr=-1.0), "lr"),
        (AdamSN, dict(lr=float("nan")), "lr"),
        (AdamSN, dict(lr=torch.ones(2)), "lr"),
        (AdamSN, dict(nu1=1.5), "nu1 must lie in"),
        (AdamSN, dict(betas=(0.9, 1.0)), "betas"),
        (AdamSN, dict(eps=-1e-8), "eps"),
        (AdamSN, dict(weight_decay=-0.1), "weight_decay"),
        (AdamSN, dict(partition="rows"), "partition"),
        (AdamSN, dict(partition=0), "partition"),
        (AdamSN, dict(norm="max"), "norm"),
        (AdamSN, dict(momentum_bits=3), "momentum_bits"),
        (AdamSN, dict(update_clip=-1.0), "update_clip"),
        (Adafactor, dict(clip=0.0), "clip"),
        (Adafactor, dict(momentum=1.0), "betas"),
        (MuonSN, dict(momentum=-0.1), "momentum"),
        (MuonSN, dict(ns_steps=0), "ns_steps"),
    ],
)
def test_bad_hyperparameters_are_one_clear_line(cls, options, words):
    with pytest.raises(UserError, match=words) as caught:
        cls([nn.Parameter(torch.ones(2, 2))], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [AdamSN, Adafactor, MuonSN])
def test_sparse_gradients_and_complex_parameters_are_refused(cls):
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UserError, match="sparse=False"):
        cls(table.parameters()).step()
    with pytest.raises(UserError, match="complex"):
        cls([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="no option"):
        cls([nn.Parameter(torch.ones(2, 2))], forech=True)


def test_a_run_length_that_does_not_divide_becomes_the_nearest_that_does():
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = AdamSN([p], partition=7)
    with pytest.warns(UserWarning, match="7 does not divide 24 weights: runs of 8 instead"):
        run(optimizer, [p], [[torch.ones(6, 4)]])
    assert optimizer.state[p]["second_moment"].numel() == 3


RESUME = """
import sys, torch
from leangpt.optim import MuonSN
saved = torch.load(sys.argv[1], weights_only=True)
p = torch.nn.Parameter(saved["p"])
optimizer = MuonSN([p], momentum_bits=4)
optimizer.load_state_dict(saved["o"])
for g in saved["grads"]:
    p.grad = g
    optimizer.step()
torch.save(p.detach(), sys.argv[1] + ".out")
"""


@pytest.mark.slow
def test_resume_in_another_process_is_bitwise(tmp_path):
    """Rounding noise is a function of the step count, so nothing else need be restored."""
    p = nn.Parameter(torch.linspace(-1, 1, 640).view(32, 20).bfloat16())
    optimizer = MuonSN([p], lr=1e-2, momentum_bits=4)
    grads = [[g.bfloat16()] for g in gradients(p.shape, steps=6)]
    run(optimizer, [p], grads[:3])
    file = str(tmp_path / "state.pt")
    saved = dict(p=p.detach().clone(), o=optimizer.state_dict(), grads=[g for (g,) in grads[3:]])
    torch.save(saved, file)
    run(optimizer, [p], grads[3:])
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", RESUME, file], cwd=root, check=True)
    assert torch.equal(torch.load(file + ".out"), p.detach())


def test_foreign_state_is_refused_and_nothing_of_it_stays():
    p = nn.Parameter(torch.ones(4, 4))
    row = AdamSN([p])
    run(row, [p], [[torch.ones(4, 4)]])
    before = copy.deepcopy(row.state_dict())
    two = AdamSN([dict(params=[p]), dict(params=[nn.Parameter(torch.ones(2))])])
    element = AdamSN([q := nn.Parameter(torch.ones(4, 4))], lr=0.5, partition="element")
    run(element, [q], [[torch.ones(4, 4)]])
    narrow = copy.deepcopy(before)
    narrow["state"][0]["momentum"] = narrow["state"][0]["momentum"].bfloat16()
    whole = copy.deepcopy(element.state_dict())
    whole["param_groups"][0]["partition"] = "row"
    no_step = copy.deepcopy(before)
    no_step["state"][0]["step"] = torch.tensor(1.0)
    bad_rate = copy.deepcopy(before)
    bad_rate["param_groups"][0]["lr"] = -1.0
    for state, words in (
        (torch.optim.AdamW([p]).state_dict(), "not saved by AdamSN"),
        (two.state_dict(), "does not fit the model"),
        (whole, r"second_moment of a weight \(4, 4\) should be float32 \(4, 1\), and is float32"),
        (narrow, r"momentum of a weight \(4, 4\) should be float32 \(4, 4\), and is bfloat16"),
        (no_step, "counts no steps"),
        (bad_rate, "lr must be"),
    ):
        with pytest.raises(UserError, match=words):
            row.load_state_dict(state)
        assert str(row.state_dict()) == str(before)
    row.load_state_dict(element.state_dict())  # its options come along
    assert row.param_groups[0]["partition"] == "element" and row.param_groups[0]["lr"] == 0.5


def test_options_that_are_gone_are_dropped_from_older_states_or_refused():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = MuonSN([p])
    state = optimizer.state_dict()
    state["param_groups"][0] |= dict(
        compile=False, skip_nonfinite=False, head_dim=2, per_head=False, transposed=False
    )
    optimizer.load_state_dict(state)
    assert not {"compile", "head_dim", "per_head"} & set(optimizer.param_groups[0])
    state["param_groups"][0]["per_head"] = True
    with pytest.raises(UserError, match="per_head=True, which is no longer there"):
        optimizer.load_state_dict(state)
    state = AdamSN([p]).state_dict()
    state["param_groups"][0]["partition"] = "head"
    with pytest.raises(UserError, match="partition must be one of"):
        AdamSN([p]).load_state_dict(state)


def test_states_saved_before_an_option_existed_mean_what_they_meant():
    p = nn.Parameter(torch.ones(4, 4))
    state = MuonSN([p]).state_dict()
    for group in state["param_groups"]:
        del group["column_norm"], group["transposed"]
    optimizer = MuonSN([p])
    assert optimizer.param_groups[0]["column_norm"]
    optimizer.load_state_dict(state)
    assert not optimizer.param_groups[0]["column_norm"]
    assert not optimizer.param_groups[0]["transposed"]
