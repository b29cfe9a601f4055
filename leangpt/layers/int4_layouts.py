"""The orders in which 4-bit weights lie in memory, each with the kernel that reads it.

    vnni   linear_cpu.int4_rows, on processors that have it
    cpu    aten._weight_int4pack_mm_for_cpu, on every other x86 and ARM; bfloat16 activations
    cuda   aten._weight_int4pack_mm, from compute capability 8.0 on; bfloat16 activations
    plain  columns 2j and 2j + 1 in the high and low half of byte j: what files hold, and what is
           left where there is no kernel

PyTorch's two orders are not documented. They are found out, not assumed: `cpu`'s by trying which
one of the known it is, `cuda`'s by asking its kernel.

Shapes: N rows (outputs), K columns (inputs); a byte holds two codes 0..15.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from leangpt.layers import linear_cpu

CHUNK = 2**18  # weights converted at a time: keeps the conversion's int32 codes small
aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    """One order of 4-bit weights in memory, and the product that reads it."""

    few_rows: int  # up to here the kernel beats unpacking and an ordinary product; 0: no kernel
    whole: int  # it takes a multiple of so many rows
    write: Callable  # plain order (N, K/2) uint8 -> the same weights in this order
    read: Callable  # (stored, K, start, stop) -> codes of rows start:stop, (stop - start, K) uint8
    multiply: Callable | None = None  # (rows (n, K), an Int4Linear) -> (n, N), bias added


def pack(codes):
    """Codes (N, K) uint8 0..15 -> plain order (N, K/2)."""
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def unpack(packed):
    """Plain order (N, K/2) -> codes (N, K) uint8."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)


def dequantize(codes, scale_zero, dtype):
    """codes (N, K) uint8, scale_zero (K/group, N, 2) -> weights (N, K)."""
    scale, zero = scale_zero.transpose(0, 1).to(dtype).unsqueeze(-1).unbind(2)  # (N, K/group, 1)
    grouped = codes.unflatten(1, (scale.size(1), -1)).to(dtype).sub_(8)
    return torch.addcmul(zero, grouped, scale).flatten(1)


def layout_for(device, out_features):
    """The name in LAYOUTS of the order that a layer of so many rows has on this device."""
    if out_features < 16:
        return "plain"
    if device.type == "cpu" and linear_cpu.available():
        return "vnni"
    if device.type == "cpu" and cpu_order() is not None:
        return "cpu"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "cuda"
    return "plain"


def chunk_rows(in_features):
    """Rows converted at a time: whole blocks of every order."""
    return max(1, CHUNK // in_features // 64) * 64


# ---- plain --------------------------------------------------------------------------------------


def write_plain(packed):
    """The order of files: two codes a byte, row by row."""
    return packed.contiguous()


def read_plain(packed, in_features, start, stop):
    """Codes of some rows, from the order of files."""
    return unpack(packed[start:stop])


# ---- vnni: blocks of 16 rows, see linear_cpu.pack_int4 ------------------------------------------


def write_vnni(packed):
    """The order that linear_cpu.c reads, a few rows at a time."""
    result = torch.empty_like(packed)
    step = chunk_rows(2 * packed.size(1))
    for i in range(0, len(packed), step):
        result[i : i + step] = linear_cpu.pack_int4(packed[i : i + step])
    return result


def read_vnni(packed, in_features, start, stop):
    """Codes of some rows, from whole blocks of 16."""
    first, last = start // 16 * 16, min(-(-stop // 16) * 16, len(packed))
    return linear_cpu.unpack_int4(packed[first:last])[start - first : stop - first]


def multiply_vnni(rows, layer):
    """As few operators as can be: a small model's step has a hundred such calls."""
    dtype, bias = rows.dtype, layer.bias
    if dtype not in linear_cpu.HALF:
        rows = rows.float()
    if bias is not None and bias.dtype != rows.dtype:
        bias = bias.to(rows.dtype)
    y = linear_cpu.int4_rows(rows, layer.packed, layer.scale_zero, bias, layer.group_size)
    return y if y.dtype == dtype else y.to(dtype)


# ---- PyTorch's own two --------------------------------------------------------------------------


def multiply_aten(kernel, rows, layer):
    """The first rows of the layer by PyTorch's kernel, the tail's by unpacking it."""
    dtype, rows = rows.dtype, rows.to(torch.bfloat16)
    y = getattr(aten, kernel)(rows, layer.packed, layer.group_size, layer.scale_zero)
    if layer.tail is not None:
        tail = dequantize(unpack(layer.tail), layer.tail_scale_zero, torch.bfloat16)
        y = torch.cat([y, F.linear(rows, tail)], dim=-1)
    if layer.bias is not None:
        y = y + layer.bias.to(y.dtype)
    return y.to(dtype)


@functools.cache
def cpu_order():
    """(rows a block, halves?) of the CPU kernel's order, or None where there is no kernel.

    A block of rows is stored input after input; one input's bytes hold rows i and i + block/2
    (halves) or rows 2i and 2i + 1. Wide registers have 64-row blocks, narrower ones 32.
    """
    codes = torch.randint(16, (112, 64), generator=torch.Generator().manual_seed(0))
    try:
        packed = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    for order in ((64, True), (32, True), (32, False)):
        if torch.equal(cpu_codes(packed, order), codes.to(torch.uint8)):
            return order
    return None


def write_cpu(packed):
    """The order of PyTorch's own CPU product."""
    result = torch.empty_like(packed)
    step = chunk_rows(2 * packed.size(1))
    for i in range(0, len(packed), step):
        codes = unpack(packed[i : i + step]).int()
        result[i : i + step] = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return result


def read_cpu(packed, in_features, start, stop):
    """Codes of some rows, from whole blocks of 64."""
    first, last = start // 64 * 64, min(-(-stop // 64) * 64, len(packed))
    return cpu_codes(packed[first:last], cpu_order())[start - first : stop - first]


def cpu_codes(packed, order):
    """Whole blocks of the CPU's order (N, K/2) -> codes (N, K)."""
    block, halves = order
    N, K = packed.size(0), 2 * packed.size(1)
    whole = N // block * block
    parts = []
    for rows, step, split in ((packed[:whole], block, halves), (packed[whole:], N - whole, False)):
        if len(rows):
            rows = rows.reshape(-1, K, step // 2)  # (blocks, K, block/2)
            low, high = rows & 15, rows >> 4
            both = torch.cat([low, high], -1) if split else torch.stack([low, high], -1).flatten(2)
            parts.append(both.transpose(1, 2).reshape(-1, K))
    return torch.cat(parts)


def write_cuda(packed):
    """(N, K/2) bytes -> the int32 tile order of the tensor-core kernel, the same size."""
    K = 2 * packed.size(1)
    inner_tiles = next(n for n in (8, 4, 2) if K % (16 * n) == 0)
    return aten._convert_weight_to_int4pack(packed.contiguous(), inner_tiles)


def read_cuda(packed, in_features, start, stop):
    """Codes by multiplying the identity: with scale 1 and zero 8 the products are the codes."""
    first, last = start // 8, -(-stop // 8)  # tiles of 8 rows
    tiles = packed[first:last].contiguous()
    rows = 8 * len(tiles)
    eye = torch.eye(in_features, dtype=torch.bfloat16, device=packed.device)
    ones = torch.ones(in_features // 32, rows, 2, dtype=torch.bfloat16, device=packed.device)
    ones[..., 1] = 8
    codes = aten._weight_int4pack_mm(eye, tiles, 32, ones).T.to(torch.uint8)
    return codes[start - 8 * first : stop - 8 * first]


LAYOUTS = {
    "plain": Layout(0, 1, write_plain, read_plain),
    "vnni": Layout(16, 1, write_vnni, read_vnni, multiply_vnni),
    "cpu": Layout(
        8, 16, write_cpu, read_cpu, functools.partial(multiply_aten, "_weight_int4pack_mm_for_cpu")
    ),
    "cuda": Layout(
        16, 16, write_cuda, read_cuda, functools.partial(multiply_aten, "_weight_int4pack_mm")
    ),
}
