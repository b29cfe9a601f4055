"""Each optimizer against a float64 reference written from its paper, and against torch's."""

import optimizer_references as reference
import pytest
import torch
from optimizer_references import LARGE, assert_close, gradients, run
from torch import nn

from leangpt.optim import Adafactor, AdamSN, MuonSN, state_bytes


@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.parametrize(
    "partition, layout",
    [
        ("row", {}),
        ("larger", {}),
        (6, {}),
        ("element", {}),
        ("larger", dict(row_blocks=(12, 6, 6))),
    ],
)
@pytest.mark.parametrize("nu1", [1.0, 0.8])
def test_adamsn_follows_the_paper(partition, layout, norm, nu1):
    for dtype in (torch.float64, torch.float32):
        p = nn.Parameter(torch.linspace(-1, 1, 24 * 10, dtype=dtype).view(24, 10))
        grads = gradients(p.shape)
        blocks = {"row_blocks": (6, 6, 6, 6)} if "row_blocks" in layout else {}  # gcd of q, k, v
        masks = None
        if partition != "element":
            masks = reference.subsets(p.shape, partition, **(layout | blocks))
        expected = reference.adamsn(
            p.detach().double(), grads, masks, 1e-2, (0.9, 0.98), 1e-8, 0.1, norm, nu1
        )
        options = dict(lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1, norm=norm, nu1=nu1)
        run(AdamSN([p], partition=partition, **options, **layout), [p], [[g] for g in grads])
        assert_close(p.detach(), expected, dtype)


@pytest.mark.parametrize("partition", ["row", "larger", 20, "element"])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("nu1", [1.0, 0.8])
def test_adamsn_large_tensors_follow_the_paper(partition, foreach, nu1):
    p = nn.Parameter(torch.linspace(-1, 1, LARGE[0] * LARGE[1]).view(LARGE))
    grads = gradients(LARGE, steps=4)
    view, dim = {"row": (LARGE, 1), "larger": (LARGE, 0), 20: ((-1, 20), 1)}.get(
        partition, ((-1, 1), 1)
    )
    expected, m, v = p.detach().double().view(view), 0, 0
    for t, g in enumerate(grads, start=1):
        g = g.view(view)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.square().mean(dim, keepdim=True)
        ahead = (1 - nu1) * g + nu1 * m / (1 - 0.9**t)
        step = ahead / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        expected = expected * (1 - 1e-3) - 1e-2 * step
    options = dict(lr=1e-2, weight_decay=0.1, nu1=nu1)
    optimizer = AdamSN([p], partition=partition, foreach=foreach, **options)
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
            lr=1e-2,
            beta2=0.97,
            decay=0.8,
            clip=clip,
            weight_decay=0.1,
            momentum=momentum,
            relative_step=relative_step,
        )
        expected = reference.adafactor(p.detach().double(), grads, **options)
        run(Adafactor([p], **options), [p], [[g] for g in grads])
        assert_close(p.detach(), expected, dtype)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
@pytest.mark.parametrize(
    "momentum, nu, even", [(0.95, 0.8, True), (0.9, 0.9, True), (0.9, 1.0, False), (0.0, 0.8, True)]
)
def test_muonsn_follows_its_equations(shape, momentum, nu, even):
    n = shape[0]
    q, k = (12, 6) if n == 24 else (6, 2)
    for split in ([0, n], [0, q, q + k, n]):  # whole; q, k and v apart
        p = nn.Parameter(torch.linspace(-1, 1, 240, dtype=torch.float64).view(shape))
        layout = dict(row_blocks=(q, k, n - q - k)) if len(split) > 2 else {}
        grads = gradients(shape)
        blocks = list(zip(split, split[1:]))
        expected = reference.muonsn(
            p.detach(), grads, blocks, 1e-2, momentum, nu, 0.9, 1e-8, 0.1, column_norm=even
        )
        optimizer = MuonSN(
            [p],
            lr=1e-2,
            momentum=momentum,
            nu=nu,
            row_beta2=0.9,
            weight_decay=0.1,
            column_norm=even,
            **layout,
        )
        run(optimizer, [p], [[g] for g in grads])
        assert (p.detach() - expected).abs().max() < 1e-9


def test_muonsn_singular_values_and_matched_rms():
    torch.manual_seed(0)
    from leangpt.optim.muonsn import orthogonalize

    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 40, 24)))
    assert 0.6 < values.min() and values.max() < 1.3
    p = nn.Parameter(torch.zeros(40, 24))
    run(MuonSN([p], lr=1e-2), [p], [[torch.randn(40, 24)]])
    assert abs(p.detach().square().mean().sqrt() - 2e-3) < 1e-6  # lr times 0.2


def test_muonsn_with_normalised_columns_does_not_see_their_scale():
    from leangpt.optim.muonsn import orthogonalize

    torch.manual_seed(0)
    x, scale = torch.randn(2, 40, 24, dtype=torch.float64), torch.rand(24).double() + 0.01
    expected = orthogonalize(x, column_norm=True)
    assert torch.allclose(orthogonalize(x * scale, column_norm=True), expected, atol=1e-12)
    assert (orthogonalize(x * scale) - orthogonalize(x)).abs().max() > 1e-2
    scale[3] = 0  # an input that never came: its column stays zero, the others count
    found = orthogonalize(x * scale, column_norm=True)
    assert found.isfinite().all() and not found[:, :, 3].any() and found[:, :, 4].any()


def test_norms_of_columns_in_two_steps_are_those_in_one():
    from leangpt.optim.muonsn import column_norms

    torch.manual_seed(0)
    x = torch.randn(2, 256, 24, dtype=torch.float64)
    expected = x.square().sum(1, keepdim=True).sqrt()
    for at_once in (32, 100, 256, 512):  # a divisor, none, all, more
        assert torch.allclose(column_norms(x, at_once), expected, rtol=1e-14)
    narrow = column_norms(x.bfloat16(), 32)
    assert narrow.dtype == torch.bfloat16
    assert torch.allclose(narrow.double(), expected, rtol=2**-7)
    blocks = x.split([192, 64], dim=1)[0]  # not contiguous: q of q, k, v
    assert torch.allclose(column_norms(blocks, 64), column_norms(blocks, 192), rtol=1e-14)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 64), (3, 96, 64), (2, 64, 130), (2, 63, 200)])
def test_muonsn_orthogonalizes_in_bfloat16_where_the_processor_is_fast(shape, fast, monkeypatch):
    from leangpt.optim import muonsn

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

    assert second("row") == 24 and second("larger") == 10
    assert second(6) == 40 and second("element") == 240
    assert second("larger", row_blocks=(8, 8, 8)) == 30
    p = nn.Parameter(torch.ones(24, 10))
    for optimizer, numbers in ((Adafactor([p]), 34), (MuonSN([p], momentum=0.0), 24)):
        run(optimizer, [p], [[torch.ones(24, 10)]])
        assert state_bytes(optimizer) == 4 * numbers
