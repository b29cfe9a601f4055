"""4-bit products for processors with AVX-512 and its integer products (VNNI), in C: linear_cpu.c.

The C compiler `cc` builds them on first use (system/c_library.py). Where there is no compiler, or
the processor is another, `available()` is false and PyTorch's own operators do the same, slower.
ATEN_CPU_CAPABILITY=avx2 has that effect too, as it has on PyTorch's.
"""

import ctypes
import functools
import platform
from pathlib import Path

import torch

from leangpt.system import c_library

SOURCE = Path(__file__).with_name("linear_cpu.c")
HEADER = SOURCE.with_suffix(".h")
HALF = {torch.bfloat16: 1, torch.float32: 0}  # the dtypes they know


class LinearArguments(ctypes.Structure):
    """linear_cpu.h's Linear: a layer's tensors and sizes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale_zero", "bias")),
        *((name, ctypes.c_int64) for name in ("N", "K", "group")),
    ]


def load(source):
    """A C file of ours that includes linear_cpu.h, as a ctypes.CDLL; None where it cannot run."""
    if platform.system() != "Linux" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    if "avx512_vnni" not in c_library.processor_flags():
        return None
    return c_library.load(source, headers=[HEADER])


@functools.cache
def library():
    """The products, built if need be; None where they cannot run."""
    loaded = load(SOURCE)
    if loaded is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        loaded.int4_rows.argtypes = [pointer] * 3 + [number] * 2
        loaded.int4_rows.restype = None
    return loaded


def available():
    """Can the products of linear_cpu.c run here?"""
    return library() is not None


def pack_int4(packed):
    """Plain order (N, K/2) uint8, K a multiple of 8 -> the kernel's: see linear_cpu.h."""
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)
    parts = []
    for rows in split_blocks(codes):
        rows = rows.unflatten(-1, (-1, 2, 4))  # (blocks, row, 8 inputs, half, 4)
        both = rows[..., 0, :] | (rows[..., 1, :] << 4)
        parts.append(both.transpose(1, 2).flatten())
    return torch.cat(parts).view(packed.shape)


def unpack_int4(packed):
    """The kernel's order, from the start of a block on, (N, K/2) -> codes (N, K) uint8."""
    parts = []
    for rows in split_blocks(packed):
        rows = rows.reshape(len(rows), -1, rows.size(1), 4).transpose(1, 2)
        parts.append(torch.stack([rows & 15, rows >> 4], dim=-2).flatten(2).flatten(0, 1))
    return torch.cat(parts)


def split_blocks(x):
    """x (N, K) -> its blocks of 16 rows (n, 16, K), and what is left (1, N % 16, K), if any."""
    whole = len(x) // 16 * 16
    parts = (x[:whole].unflatten(0, (-1, 16)), x[None, whole:])
    return [part for part in parts if part.numel()]


def int4_rows(x, packed, scale_zero, bias, group_size):
    """x (M, K) W^T + bias -> (M, N) in x's dtype, bfloat16 or float32, as bias must be.

    packed (N, K/2) from pack_int4, scale_zero (K/group, N, 2) bfloat16. Sums are float32; an
    infinite input makes its row NaN.
    """
    (M, K), N = x.shape, packed.size(0)
    x = x.contiguous()
    y = x.new_empty(M, N)
    layer = LinearArguments(
        packed.data_ptr(),
        scale_zero.data_ptr(),
        None if bias is None else bias.data_ptr(),
        N,
        K,
        group_size,
    )
    library().int4_rows(x.data_ptr(), y.data_ptr(), ctypes.addressof(layer), M, HALF[x.dtype])
    return y
