"""4-bit layers: orders in memory, the ways to multiply, state dicts."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from int4_models import linear, make_model, relative
from torch import nn
from torch.nn import functional as F

from leangpt.int4.quantize import quantize_, round_linear
from leangpt.layers import int4_layouts, linear_cpu
from leangpt.layers.int4_linear import Int4Linear

SHAPES = [(128, 64), (65, 128), (16, 32), (5, 64), (144, 96), (161, 128), (4100, 32)]


def test_pack_is_two_values_a_byte():
    codes = torch.randint(16, (7, 64), dtype=torch.uint8)
    packed = int4_layouts.pack(codes)
    assert packed.shape == (7, 32) and packed.dtype == torch.uint8
    assert packed[3, 5] == codes[3, 10] * 16 + codes[3, 11]
    assert torch.equal(int4_layouts.unpack(packed), codes)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_survive_the_kernels_order(shape):
    N, K = shape
    layer = Int4Linear(K, N)
    codes = torch.randint(16, (N, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    layer.store(int4_layouts.pack(codes), torch.zeros(K // 32, N, 2, dtype=torch.bfloat16))
    assert torch.equal(layer.codes(), codes)
    for start, stop in ((0, 1), (N // 3, N), (N - 1, N), (N // 2, N // 2 + 2)):
        assert torch.equal(layer.codes(start, stop), codes[start:stop])


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [65, 128, 5])
def test_kernel_and_plain_paths_agree(out_features, bias, group_size):
    layer = round_linear(linear(out_features, 256, bias), group_size)
    x = torch.randn(3, 2, 256, dtype=torch.bfloat16)
    weight = layer.dequantize(torch.float32)
    want = F.linear(x.float(), weight, layer.bias)
    few, many = layer(x), layer(x.repeat(5, 1, 1))[:3]
    assert few.shape == want.shape and few.dtype == x.dtype
    assert relative(few, want) < 5e-3 and relative(many, want) < 8e-3
    assert relative(layer(x.float()), want) < 5e-3 and layer(x.float()).dtype == torch.float32
    if out_features > 60:
        assert relative(layer.forward_rows(x, 20, 50), want[..., 20:50]) < 5e-3
        many = layer.forward_rows(x.repeat(5, 1, 1), 20, 50)[:3]
        assert relative(many, want[..., 20:50]) < 8e-3


@pytest.mark.skipif(int4_layouts.cpu_order() is None, reason="no CPU kernel")
@pytest.mark.parametrize("layout", ["vnni", "cpu"])
def test_the_kernel_is_what_runs_for_few_rows(layout, monkeypatch):
    if layout == "vnni" and not linear_cpu.available():
        pytest.skip("needs cc, AVX-512 and VNNI")
    monkeypatch.setattr(linear_cpu, "available", lambda: layout == "vnni")
    layer = round_linear(linear(64, 64), 32)
    monkeypatch.setattr(layer, "_dense", None)  # would fail if called
    assert layer.layout == layout
    layer(torch.randn(1, 1, 64))
    with pytest.raises(TypeError):
        layer(torch.randn(1, 100, 64))


@pytest.mark.skipif(int4_layouts.cpu_order() is None, reason="no CPU kernel")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [65, 128])
def test_pytorchs_own_cpu_kernel_agrees(out_features, bias, monkeypatch):
    """Where linear_cpu runs it would otherwise never be tried."""
    monkeypatch.setattr(linear_cpu, "available", lambda: False)
    layer = round_linear(linear(out_features, 256, bias), 32)
    assert layer.layout == "cpu"
    x = torch.randn(3, 2, 256, dtype=torch.bfloat16)
    want = F.linear(x.float(), layer.dequantize(), layer.bias)
    assert relative(layer(x), want) < 5e-3
    codes, saved = layer.codes(), layer.state_dict()["packed"]
    assert torch.equal(int4_layouts.unpack(saved), codes)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_processors_orders(capability):
    """The kernel's byte order depends on the register width; ours is found out at run time."""
    code = (
        "import torch; from leangpt.layers.int4_layouts import unpack; torch.manual_seed(0);"
        "from leangpt.int4.quantize import round_linear;"
        "l = torch.nn.Linear(64, 112);"
        "q = round_linear(l); x = torch.randn(1, 64).bfloat16();"
        "w = q.dequantize(); e = (q(x).float() - torch.nn.functional.linear(x.float(), w, "
        "l.bias)).norm(); print(q.layout, float(e) < 0.05, torch.equal(q.codes(), "
        "unpack(q.state_dict()['packed'])))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.split()[1:] == ["True", "True"], done.stdout + done.stderr


def test_state_dict_round_trip_and_its_errors():
    model = quantize_(make_model(), 32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = quantize_(make_model(bias=True), 32)
    for m in other.modules():
        if isinstance(m, Int4Linear):
            m.store(torch.zeros_like(m.plain_order()[0]), torch.zeros_like(m.plain_order()[1]))
    other.load_state_dict(state)
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    idx = torch.randint(65, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(idx)[0], other(idx)[0])
    name = "transformer.h.0.attn.c_attn.packed"
    with pytest.raises(RuntimeError, match=r"\(1, 2\), not \(192, 32\)"):
        other.load_state_dict(state | {name: torch.zeros(1, 2, dtype=torch.uint8)})
    missing = dict(state)
    del missing[name]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(missing)


def test_casts_keep_the_scales():
    layer = round_linear(linear(64, 64), 32)
    before = layer.dequantize()
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double):
        cast(layer)
        assert layer.scale_zero.dtype == torch.bfloat16
        assert torch.equal(layer.dequantize(), before)
    assert layer.bias.dtype == torch.float64
    deep = copy.deepcopy(layer)
    assert torch.equal(deep.dequantize(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(256, 128), (65, 256), (2304, 768), (5, 128)])
def test_cuda_agrees_with_the_cpu(shape, group_size):
    layer = round_linear(linear(*shape), group_size)
    x = torch.randn(3, shape[1], dtype=torch.bfloat16)
    want, weight, codes = layer(x), layer.dequantize(), layer.codes()
    layer = layer.cuda()
    assert layer.layout == ("cuda" if shape[0] >= 16 else "plain")
    assert torch.equal(layer.codes().cpu(), codes)
    assert torch.equal(layer.dequantize().cpu(), weight)
    assert relative(layer(x.cuda()).cpu(), want) < 5e-3
    assert relative(layer(x.cuda().repeat(20, 1))[:3].cpu(), want) < 8e-3
    back = layer.cpu()
    assert torch.equal(back(x), want)
