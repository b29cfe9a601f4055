"""The CPU's 4-bit products against plain PyTorch."""

import shutil
from pathlib import Path

import pytest
import torch
from int4_models import relative
from torch.nn import functional as F

from leangpt.int4.quantize import round_linear
from leangpt.layers import int4_layouts, linear_cpu

needs_kernels = pytest.mark.skipif(not linear_cpu.available(), reason="needs cc, AVX-512 and VNNI")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_they_are_built_where_they_can_be():
    cpuinfo = Path("/proc/cpuinfo")
    can = (
        cpuinfo.exists()
        and "avx512_vnni" in cpuinfo.read_text()
        and shutil.which("cc")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
    assert linear_cpu.available() == bool(can)


def test_a_source_that_does_not_compile_is_no_error(tmp_path, monkeypatch):
    source = tmp_path / "bad.c"
    source.write_text("int f( {")
    monkeypatch.setattr(linear_cpu, "SOURCE", source)
    monkeypatch.setenv("LEANGPT_CACHE", str(tmp_path / "cache"))
    assert linear_cpu.library.__wrapped__() is None
    left = tmp_path / "cache"
    assert not left.exists() or list(left.iterdir()) == []


def test_packing_goes_both_ways():
    codes = torch.randint(16, (48, 64), dtype=torch.uint8)
    packed = linear_cpu.pack_int4(int4_layouts.pack(codes))
    assert packed.shape == (48, 32) and torch.equal(linear_cpu.unpack_int4(packed), codes)
    # row 17 is row 1 of block 1; its input 13 is of the second 8, the high half of number 1
    assert packed.view(3, 8, 16, 4)[1, 1, 1, 1] >> 4 == codes[17, 13]
    odd = linear_cpu.pack_int4(int4_layouts.pack(codes[:37]))  # the last block has 5 rows
    assert odd.shape == (37, 32) and torch.equal(linear_cpu.unpack_int4(odd), codes[:37])
    assert torch.equal(odd[:32], packed[:32])


@needs_kernels
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 5e-5), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize(
    "M,N,K,group",
    [
        (1, 16, 32, 32),
        (1, 2304, 768, 32),
        (3, 112, 256, 64),
        (10, 80, 128, 128),
        (64, 64, 3072, 32),
        (2, 65, 64, 32),
        (1, 31, 96, 32),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_int4_rows(M, N, K, group, dtype, limit, biased):
    codes = torch.randint(16, (N, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scale_zero = random(K // group, N, 2, dtype=torch.bfloat16)
    x = random(M, K, seed=2, dtype=dtype)
    bias = random(N, seed=3, dtype=dtype) * 50 if biased else None
    weight = int4_layouts.dequantize(codes, scale_zero, torch.float64)
    want = F.linear(x.double(), weight, None if bias is None else bias.double())
    packed = linear_cpu.pack_int4(int4_layouts.pack(codes))
    got = linear_cpu.int4_rows(x, packed, scale_zero, bias, group)
    assert got.dtype == dtype and got.shape == (M, N)
    assert relative(got, want) < limit


@needs_kernels
def test_int4_rows_with_outliers_zeros_and_nan():
    layer = round_linear(torch.nn.Linear(128, 64, bias=False))
    weight = layer.dequantize(torch.float64)
    x = random(4, 128)
    x[0, 40] = 3e4  # its group's other inputs lose what bfloat16 would have rounded off it
    x[1] = 0
    x[2, 7] = 1e-30
    got, want = layer(x), x.double() @ weight.T
    coarse = x.bfloat16().double() @ weight.T
    assert (got[0] - want[0]).abs().max() < (coarse[0] - want[0]).abs().max() / 10
    assert not got[1].any()
    assert relative(got[2:], want[2:]) < 5e-5
    for bad in (torch.nan, torch.inf):
        x[3, 100] = bad
        assert not layer(x)[3].isfinite().any() and layer(x)[:3].isfinite().all()
