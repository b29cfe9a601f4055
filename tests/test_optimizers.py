"""Each optimizer against a float64 reference, against torch, and as a drop-in Optimizer."""

import copy
import functools
import io
import subprocess
import sys
from pathlib import Path

import optimizer_references as reference
import pytest
import torch
from torch import nn

from errors import UserError
from optimizers import Adafactor, AdamSN, MuonSN, state_bytes

STEPS = 50
CLASSES = [
    (AdamSN, dict(partition="row")),
    (AdamSN, dict(partition="column", momentum_bits=8)),
    (Adafactor, dict()),
    (Adafactor, dict(momentum=0.9, momentum_bits=16)),
    (Adafactor, dict(relative_step=True)),
    (MuonSN, dict()),
    (MuonSN, dict(momentum_bits=4)),
    (MuonSN, dict(momentum=0.0)),
]
each_class = pytest.mark.parametrize("cls, options", CLASSES)


def gradients(shape, steps=STEPS, seed=0):
    """Gradients of uneven size over rows and columns, as float64."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    return [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)
    ]


def run(optimizer, params, grads):
    """One step for each list of gradients (one gradient a parameter)."""
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.to(p.dtype).to(p.device).clone()
        optimizer.step()


def assert_close(actual, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


LARGE = (1030, 260)  # beyond the size that is stacked: the multi-tensor kernels take it


@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.parametrize(
    "partition, layout",
    [
        ("row", {}), ("column", {}), ("larger", {}), (6, {}), ("element", {}),
        ("column", dict(row_blocks=(12, 6, 6))), ("head", dict(head_dim=3)),
        ("head_column", dict(head_dim=3)),
    ],
)  # fmt: skip
def test_adamsn_follows_the_paper(partition, layout, norm):
    for dtype in (torch.float64, torch.float32):
        p = nn.Parameter(torch.linspace(-1, 1, 24 * 10, dtype=dtype).view(24, 10))
        grads = gradients(p.shape)
        blocks = {"row_blocks": (6, 6, 6, 6)} if "row_blocks" in layout else {}  # gcd of q, k, v
        masks = None
        if partition != "element":
            masks = reference.subsets(p.shape, partition, **(layout | blocks))
        expected = reference.adamsn(
            p.detach().double(), grads, masks, 1e-2, (0.9, 0.98), 1e-8, 0.1, norm
        )
        options = dict(lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1, norm=norm)
        run(AdamSN([p], partition=partition, **options, **layout), [p], [[g] for g in grads])
        assert_close(p.detach(), expected, dtype)


@pytest.mark.parametrize("partition", ["row", "column", 20, "element"])
@pytest.mark.parametrize("foreach", [True, False])
def test_adamsn_large_tensors_follow_the_paper(partition, foreach):
    p = nn.Parameter(torch.linspace(-1, 1, LARGE[0] * LARGE[1]).view(LARGE))
    grads = gradients(LARGE, steps=4)
    view, dim = {"row": (LARGE, 1), "column": (LARGE, 0), 20: ((-1, 20), 1)}.get(
        partition, ((-1, 1), 1)
    )
    expected, m, v = p.detach().double().view(view), 0, 0
    for t, g in enumerate(grads, start=1):
        g = g.view(view)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.square().mean(dim, keepdim=True)
        step = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        expected = expected * (1 - 1e-3) - 1e-2 * step
    optimizer = AdamSN([p], lr=1e-2, weight_decay=0.1, partition=partition, foreach=foreach)
    run(optimizer, [p], [[g] for g in grads])
    assert_close(p.detach(), expected.view(LARGE), p.dtype)


@pytest.mark.parametrize("shape", [(24, 10), (17,)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("relative_step", [False, True])
@pytest.mark.parametrize("clip", [0.7, 1e9])
def test_adafactor_follows_the_paper(shape, momentum, relative_step, clip):
    for dtype in (torch.float64, torch.float32):
        p = nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=dtype).view(shape))
        grads = gradients(shape)
        options = dict(
            lr=1e-2, beta2=0.97, decay=0.8, clip=clip, weight_decay=0.1, momentum=momentum,
            relative_step=relative_step,
        )  # fmt: skip
        expected = reference.adafactor(p.detach().double(), grads, **options)
        run(Adafactor([p], **options), [p], [[g] for g in grads])
        assert_close(p.detach(), expected, dtype)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
@pytest.mark.parametrize("momentum, nu", [(0.95, 0.8), (0.9, 0.9), (0.9, 1.0), (0.0, 0.8)])
def test_muonsn_follows_its_equations(shape, momentum, nu):
    for per_head, split in ((False, [0, shape[0]]), (True, None), (None, None)):
        p = nn.Parameter(torch.linspace(-1, 1, 240, dtype=torch.float64).view(shape))
        n, layout = shape[0], {}
        if split is None:  # q: half of the rows, k and v a quarter each where they divide
            q, k = (12, 6) if n == 24 else (6, 2)
            head = 3 if n == 24 else 2
            layout = dict(row_blocks=(q, k, n - q - k), head_dim=head, per_head=bool(per_head))
            split = [0, q, q + k, n]
            if per_head:
                split = [*range(0, q + k + 1, head), n]
        grads = gradients(shape)
        blocks = list(zip(split, split[1:]))
        expected = reference.muonsn(
            p.detach(), grads, blocks, 1e-2, momentum, nu, 0.9, 1e-8, 0.1
        )
        optimizer = MuonSN(
            [p], lr=1e-2, momentum=momentum, nu=nu, row_beta2=0.9, weight_decay=0.1,
            **layout,
        )  # fmt: skip
        run(optimizer, [p], [[g] for g in grads])
        assert (p.detach() - expected).abs().max() < 1e-9


def test_muonsn_singular_values_and_matched_rms():
    torch.manual_seed(0)
    from muonsn import orthogonalize

    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 40, 24)))
    assert 0.6 < values.min() and values.max() < 1.3
    p = nn.Parameter(torch.zeros(40, 24))
    run(MuonSN([p], lr=1e-2), [p], [[torch.randn(40, 24)]])
    assert abs(p.detach().square().mean().sqrt() - 2e-3) < 1e-6  # lr times 0.2


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 64), (3, 96, 64), (2, 64, 130), (2, 63, 200)])
def test_muonsn_orthogonalizes_in_bfloat16_where_the_processor_is_fast(shape, fast, monkeypatch):
    import muonsn

    monkeypatch.setattr(muonsn, "fast_bfloat16", lambda: fast)
    torch.manual_seed(0)
    x = torch.randn(shape)
    exact = muonsn.orthogonalize(x.double())
    found = muonsn.orthogonalize(x)
    assert exact.dtype == torch.float64 and found.dtype == torch.float32
    assert found.is_contiguous() and found.shape == x.shape
    error = (found - exact).norm() / exact.norm()
    assert error < 3e-2
    assert (error > 1e-4) == (fast and min(shape[1:]) >= muonsn.BFLOAT16_SIDE)


@pytest.mark.parametrize("shape", [(24, 10), (7,), (2, 3, 4, 5), LARGE])
@pytest.mark.parametrize("maximize", [False, True])
def test_one_element_a_subset_is_torch_adamw(shape, maximize):
    p = nn.Parameter(torch.ones(shape))
    q = nn.Parameter(torch.ones(shape))
    grads = [[g] for g in gradients(shape, steps=10)]
    options = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, maximize=maximize)
    run(torch.optim.AdamW([q], **options), [q], grads)
    for partition in ("element", 1):
        with torch.no_grad():
            p.fill_(1)
        run(AdamSN([p], partition=partition, **options), [p], grads)
        assert_close(p.detach(), q.detach().double(), p.dtype)


def test_state_sizes_are_what_the_partition_says():
    def second(partition, **layout):
        p = nn.Parameter(torch.ones(24, 10))
        optimizer = AdamSN([p], partition=partition, **layout)
        run(optimizer, [p], [[torch.ones(24, 10)]])
        assert optimizer.state[p]["momentum"].numel() == 240
        assert state_bytes(optimizer) == 4 * (240 + optimizer.state[p]["second_moment"].numel())
        return optimizer.state[p]["second_moment"].numel()

    assert second("row") == 24 and second("column") == 10 and second("larger") == 10
    assert second(6) == 40 and second("element") == 240
    assert second("head", head_dim=4) == 6 and second("head_column", head_dim=4) == 60
    assert second("column", row_blocks=(8, 8, 8)) == 30
    p = nn.Parameter(torch.ones(24, 10))
    for optimizer, numbers in ((Adafactor([p]), 34), (MuonSN([p], momentum=0.0), 24)):
        run(optimizer, [p], [[torch.ones(24, 10)]])
        assert state_bytes(optimizer) == 4 * numbers


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
            dict(params=params[::2], lr=1e-2), dict(params=params[1::2], weight_decay=0.0),
        ]  # fmt: skip
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


@each_class
def test_nonfinite_gradients_can_be_skipped(cls, options):
    p, q = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(5))
    optimizer = cls([p, q], lr=1e-2, skip_nonfinite=True, **options)
    run(optimizer, [p, q], [[torch.ones(6, 4), torch.ones(5)]])
    before = copy.deepcopy((p, q, optimizer.state_dict()["state"]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        run(optimizer, [p, q], [[torch.ones(6, 4), torch.tensor([1, 1, bad, 1, 1])]])
    assert optimizer.skipped_steps == 3 and copy.deepcopy(optimizer).skipped_steps == 3
    saved = optimizer.state_dict()
    other = cls([nn.Parameter(p.detach().clone()), nn.Parameter(q.detach().clone())])
    other.load_state_dict(saved)
    assert other.skipped_steps == 3
    del saved["skipped_steps"]  # a state saved before this was counted
    other.load_state_dict(saved)
    assert other.skipped_steps == 0
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])
    assert str(optimizer.state_dict()["state"]) == str(before[2])
    run(optimizer, [p, q], [[torch.ones(6, 4), torch.ones(5)]])
    assert not torch.equal(p, before[0])


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


@pytest.mark.parametrize("cls, backend", [(AdamSN, "inductor"), (Adafactor, "aot_eager")])
def test_compiled_equals_eager(cls, backend, monkeypatch):
    """One graph for every step and rate: the second step must not compile again."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    results, shape = [], (1088, 260)
    for compile in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape))
        optimizer = cls([p], lr=1e-2, weight_decay=0.1, compile=compile)
        run(optimizer, [p], [[g] for g in gradients(shape, steps=1)])
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        optimizer.param_groups[0]["lr"] = 5e-3
        run(optimizer, [p], [[g] for g in gradients(shape, steps=3, seed=1)])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        assert (optimizer._compiled is not None) == compile
        results.append(p.detach())
    assert_close(results[1], results[0].double(), torch.float32)


RESUME = """
import sys, torch
from optimizers import MuonSN
saved = torch.load(sys.argv[1], weights_only=True)
p = torch.nn.Parameter(saved["p"])
optimizer = MuonSN([p], momentum_bits=4)
optimizer.load_state_dict(saved["o"])
for g in saved["grads"]:
    p.grad = g
    optimizer.step()
torch.save(p.detach(), sys.argv[1] + ".out")
"""


def test_resume_in_another_process_is_bitwise(tmp_path):
    """Rounding noise is a function of the step count, so nothing else need be restored."""
    p = nn.Parameter(torch.linspace(-1, 1, 640).view(32, 20).bfloat16())
    optimizer = MuonSN([p], lr=1e-2, momentum_bits=4)
    grads = [[g.bfloat16()] for g in gradients(p.shape, steps=6)]
    run(optimizer, [p], grads[:3])
    file = str(tmp_path / "state.pt")
    saved = dict(p=p.detach().clone(), o=optimizer.state_dict(), grads=[g for g, in grads[3:]])
    torch.save(saved, file)
    run(optimizer, [p], grads[3:])
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", RESUME, file], cwd=root, check=True)
    assert torch.equal(torch.load(file + ".out"), p.detach())


def test_foreign_state_is_refused():
    p = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(UserError, match="not saved by AdamSN"):
        AdamSN([p]).load_state_dict(torch.optim.AdamW([p]).state_dict())
    two = AdamSN([dict(params=[p]), dict(params=[nn.Parameter(torch.ones(2))])])
    with pytest.raises(UserError, match="does not fit the model"):
        AdamSN([p]).load_state_dict(two.state_dict())
