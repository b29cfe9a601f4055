"""Tile kernels and their merge against plain softmax attention in float64."""

import pytest
import torch
from reference import relative_error, softmax_attention

from leangpt.attention.tile_kernels import KERNELS, merge_, tile_kernel

CPU_KERNELS = ("math", "cpu")


def random_qkv(B, H, G, t, s, D, dtype):
    torch.manual_seed(0)
    shapes = ((B, H, t, D), (B, G, s, D), (B, G, s, D))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("G", (1, 2, 4))
@pytest.mark.parametrize("dtype,tolerance", ((torch.float64, 1e-12), (torch.float32, 2e-6)))
def test_kernel_is_softmax_attention_with_its_logsumexp(kernel, G, dtype, tolerance):
    forward, backward = KERNELS[kernel]
    q, k, v = random_qkv(2, 4, G, 13, 13, 8, dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = softmax_attention(*wide)
    grad = torch.randn_like(expected)
    expected.backward(grad)

    with torch.no_grad():
        out, lse = forward(q, k, v, True)
        grads = backward(grad.to(dtype), q, k, v, out, lse, True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert relative_error(out, expected) < tolerance
    for found, x in zip(grads, wide):
        assert found.shape == x.shape
        assert relative_error(found, x.grad) < tolerance


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_two_tiles_merge_to_the_whole(kernel):
    forward, _ = KERNELS[kernel]
    q, k, v = (x.detach() for x in random_qkv(1, 4, 2, 5, 11, 8, torch.float64))
    whole, whole_lse = forward(q, k, v, False)
    out, lse = (x.clone() for x in forward(q, k[:, :, :4], v[:, :, :4], False))
    merge_(out, lse, *forward(q, k[:, :, 4:], v[:, :, 4:], False))
    assert relative_error(out, whole) < 1e-14
    assert relative_error(lse, whole_lse) < 1e-14


def test_kernel_choice():
    cpu = torch.zeros(1, 1, 1, 8)
    assert tile_kernel(cpu, cpu) == "cpu"
    assert tile_kernel(cpu.half(), cpu.half()) == "math"
