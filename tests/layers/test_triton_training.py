"""The training kernels of the MLP and the loss against float32 PyTorch.

On a GPU, or in Triton's interpreter on a CPU (TRITON_INTERPRET=1).
"""

import math

import pytest
import torch
from torch.nn import functional as F

from leangpt.layers import mlp_triton
from model import GPT, GPTConfig

HERE = mlp_triton.AVAILABLE and (
    mlp_triton.INTERPRETED or torch.cuda.get_device_capability()[0] == 9
)
pytestmark = pytest.mark.skipif(not HERE, reason="needs a Hopper GPU, or TRITON_INTERPRET=1")
DEVICE = "cpu" if mlp_triton.INTERPRETED else "cuda"
HALF = torch.float16 if mlp_triton.INTERPRETED else torch.bfloat16  # it multiplies no bfloat16


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def gelu_error(tanh):
    """Largest error of the kernel's gelu and slope, and of Phi's tail relative to itself."""
    h = torch.linspace(-6, 6, 4 * 1024, dtype=torch.float32, device=DEVICE)
    wide = h.double().requires_grad_()
    expected = F.gelu(wide, approximate="tanh" if tanh else "none")
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    found = torch.empty(2, len(h), device=DEVICE)
    probe_kernel[(4,)](h, found, len(h), tanh)
    tail = (h < -0.1) & (h > -5)
    near = ((found[0] - expected) / expected)[tail].abs().max()
    return (found[0] - expected).abs().max(), (found[1] - slope).abs().max(), near


if HERE:
    import triton
    import triton.language as tl

    @triton.jit
    def probe_kernel(h, found, count, TANH: tl.constexpr):
        at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        gelu, slope = mlp_triton.gelu_and_slope(tl.load(h + at), TANH)
        tl.store(found + at, gelu)
        tl.store(found + count + at, slope)


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_and_its_slope(tanh):
    value, slope, tail = gelu_error(tanh)
    assert value < 4e-5 and slope < 1e-4, (float(value), float(slope))
    assert tail < 3e-4, float(tail)  # bfloat16 rounds to 2e-3


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("rows,C,inner", [(256, 64, 256), (512, 128, 512)])
def test_mlp_agrees_with_float32(rows, C, inner, tanh):
    torch.manual_seed(0)
    x, w_fc, w_proj = (
        torch.randn(shape, device=DEVICE).to(HALF).requires_grad_()
        for shape in ((2, rows // 2, C), (inner, C), (C, inner))
    )
    with torch.no_grad():
        w_fc.mul_(1.5 / math.sqrt(C))
        w_proj.mul_(1 / math.sqrt(inner))
    dy = torch.randn_like(x)
    wide = [p.detach().float().requires_grad_() for p in (x, w_fc, w_proj)]
    expected = F.gelu(wide[0] @ wide[1].T, approximate="tanh" if tanh else "none") @ wide[2].T
    grads = torch.autograd.grad(expected, wide, dy.float())
    y = mlp_triton.gelu_mlp(x, w_fc, w_proj, tanh)
    assert relative(y.detach(), expected.detach()) < 5e-3
    for found, grad in zip(torch.autograd.grad(y, (x, w_fc, w_proj), dy), grads):
        assert relative(found, grad) < 8e-3


def test_model_uses_the_kernels_in_one_graph(monkeypatch):
    """The compiled model, MLP kernels inside, has the plain model's loss and gradients."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=128, vocab_size=64, n_layer=2, n_head=2, n_embd=64, dropout=0.0)
    model = GPT(config).to(DEVICE)
    idx = torch.randint(64, (2, 128), device=DEVICE)
    calls = []
    monkeypatch.setattr(mlp_triton, "supports", lambda *_: False)
    _, wide = model(idx, idx.roll(-1, 1))
    expected = torch.autograd.grad(wide, list(model.parameters()))
    monkeypatch.setattr(mlp_triton, "supports", lambda *_: True)
    launch = mlp_triton.down_and_gelu_backward
    monkeypatch.setattr(
        mlp_triton, "down_and_gelu_backward", lambda *given: calls.append(1) or launch(*given)
    )
    torch._dynamo.reset()
    mlp = torch.compile(model.transformer.h[0].finish, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(model.transformer.h[0], "finish", mlp)
    with torch.autocast(DEVICE, HALF):
        _, loss = model(idx, idx.roll(-1, 1))
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert len(calls) == 2
    assert abs(float(loss - wide)) < 2e-2
    for a, b in zip(found, expected):
        assert relative(a, b) < 3e-2


@pytest.mark.parametrize("V", [64, 9000, 20000, 50304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_kernels(V, dtype):
    from leangpt.layers.loss_triton import loss_and_grad

    torch.manual_seed(0)
    rows = 5
    logits = (3 * torch.randn(rows, V, device=DEVICE)).to(dtype)
    targets = torch.randint(V, (rows,), device=DEVICE)
    targets[1] = -1
    targets[2], targets[3] = V - 1, 0
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, ignore_index=-1)
    (grad,) = torch.autograd.grad(expected, wide)
    loss, found = loss_and_grad(logits, targets, (targets != -1).sum(), -1)
    assert abs(float(loss) - float(expected)) < 1e-5 * float(expected)
    assert relative(found, grad) < (1e-5 if dtype == torch.float32 else 6e-3)
    assert found[1].abs().max() == 0


@pytest.mark.parametrize("V", [64, 9000])
def test_loss_is_not_a_number_where_every_target_is_ignored(V):
    """As torch's mean over nothing, on the CPU and on a GPU alike."""
    from leangpt.layers.loss_triton import loss_and_grad

    logits, targets = torch.randn(2, V, device=DEVICE).to(HALF), torch.full((2,), -1, device=DEVICE)
    loss, _ = loss_and_grad(logits, targets, (targets != -1).sum(), -1)
    assert torch.isnan(loss)
