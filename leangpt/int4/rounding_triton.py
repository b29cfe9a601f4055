"""The steps of int4/rounding.py as CUDA kernels, in Triton: one launch for a group of inputs.

As PyTorch operators a step takes several launches for each of a group's inputs, which one after the
other decide their codes: millions for a whole model. Here a program takes COLUMNS rows of the
weight matrix through a step in registers, as rounding_cpu.c does. All tensors are contiguous
float32, (group, n) as there; what the steps do is said there and in rounding.py.
"""

import functools

import torch

from leangpt.system.triton import tl, triton

COLUMNS = 16  # rows of the weight matrix that a program takes

if triton is not None:

    @triton.jit
    def _bfloat16(x):
        """To nearest, ties to even, as float32."""
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def _storable(scale):
        return _bfloat16(tl.maximum(scale, 1e-8))

    @triton.jit
    def _nearest(x):
        """The code: to nearest, ties to even, by making the last bit worth 1."""
        x = tl.minimum(tl.maximum(x, -8.0), 7.0)
        return (x + 12582912.0) - 12582912.0

    @triton.jit
    def _sum(x):
        """Over a group's inputs, (GROUP, columns) -> (1, columns)."""
        return tl.sum(x, 0)[None, :]

    @triton.jit
    def _fit_kernel(
        block,
        importance,
        shrinks,
        scales,
        zeros,
        n,
        GROUP: tl.constexpr,
        COLUMNS: tl.constexpr,
        SHRINKS: tl.constexpr,
        REFITS: tl.constexpr,
    ):
        j = tl.arange(0, GROUP)[:, None]
        i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(block + j * n + i, mask=i < n, other=0.0)
        h = tl.load(importance + j)
        low, high, mean = tl.min(x, 0)[None, :], tl.max(x, 0)[None, :], _sum(h * x)
        best = low * 0 + float("inf")
        best_scale, best_zero = low, low
        for index in tl.static_range(SHRINKS):
            shrink = tl.load(shrinks + index)
            step = (high - low) * (shrink / 15)
            scale, zero = _storable(step), _bfloat16((low + high) * (shrink / 2) + step / 2)
            codes = _nearest((x - zero) / scale)
            for _ in tl.static_range(REFITS):
                mean_code = _sum(h * codes)
                centred = h * (codes - mean_code)
                slope = _sum(centred * x) / _sum(centred * codes)
                slope = tl.where(slope > 0, slope, scale)  # not where all codes are equal
                scale, zero = _storable(slope), _bfloat16(mean - slope * mean_code)
                codes = _nearest((x - zero) / scale)
            off = codes * scale + zero - x
            error = _sum(h * off * off)
            better = error < best
            best = tl.where(better, error, best)
            best_scale = tl.where(better, scale, best_scale)
            best_zero = tl.where(better, zero, best_zero)
        tl.store(scales + i, best_scale, mask=i < n)
        tl.store(zeros + i, best_zero, mask=i < n)

    @triton.jit
    def _compensate_kernel(
        block, spread, scales, zeros, codes, errors, n, GROUP: tl.constexpr, COLUMNS: tl.constexpr
    ):
        j = tl.arange(0, GROUP)[:, None]
        i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = i < n
        left = tl.load(block + j * n + i, mask=inside, other=0.0)
        scale = tl.load(scales + i, mask=inside, other=1.0)
        zero = tl.load(zeros + i, mask=inside, other=0.0)
        code, error = left * 0, left * 0
        for now in range(GROUP):
            here = j == now
            row = tl.load(spread + now * GROUP + j)
            x = _sum(tl.where(here, left, 0.0))
            c = _nearest((x - zero) / scale)
            e = (x - (c * scale + zero)) / tl.load(spread + now * GROUP + now)
            left -= tl.where(j > now, row, 0.0) * e
            code, error = tl.where(here, c, code), tl.where(here, e, error)
        tl.store(codes + j * n + i, code, mask=inside)
        tl.store(errors + j * n + i, error, mask=inside)

    @triton.jit
    def _descend_kernel(
        own, pulls, lost, codes, scales, zeros, n, GROUP: tl.constexpr, COLUMNS: tl.constexpr
    ):
        j = tl.arange(0, GROUP)[:, None]
        i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = i < n
        code = tl.load(codes + j * n + i, mask=inside, other=0.0)
        pull = tl.load(pulls + j * n + i, mask=inside, other=0.0)
        scale = tl.load(scales + i, mask=inside, other=1.0)
        zero = tl.load(zeros + i, mask=inside, other=0.0)
        pulled, sums = code * 0, tl.zeros((GROUP, 1), tl.float32)
        for now in range(GROUP):  # own is symmetric: its rows are its columns
            row = tl.load(own + now * GROUP + j)
            pulled += row * _sum(tl.where(j == now, code, 0.0))
            sums += row
        one = tl.sum(tl.sum(sums, 0), 0)
        cc, c1 = _sum(code * pulled), _sum(sums * code)
        rc, r1 = _sum(code * pull), _sum(pull)
        determinant = cc * one - c1 * c1  # the normal equations of both changes
        new_scale = _storable(scale + (one * rc - c1 * r1) / determinant)
        new_zero = _bfloat16(zero + (cc * r1 - c1 * rc) / determinant)
        moved = code * (new_scale - scale) + (new_zero - zero)
        pulled = pulled * (new_scale - scale) + sums * (new_zero - zero)
        better = _sum(moved * (pulled - 2 * pull)) < 0  # never where determinant is 0
        moved, pull = tl.where(better, moved, 0.0), pull - tl.where(better, pulled, 0.0)
        scale, zero = tl.where(better, new_scale, scale), tl.where(better, new_zero, zero)
        for now in range(GROUP):
            here = j == now
            row = tl.load(own + now * GROUP + j)
            before = _sum(tl.where(here, code, 0.0)) * scale + zero
            pushed = _sum(tl.where(here, pull, 0.0)) / tl.load(own + now * GROUP + now)
            c = _nearest((before + pushed - zero) / scale)
            change = c * scale + zero - before
            pull -= tl.where(j > now, row, 0.0) * change
            moved = tl.where(here, moved + change, moved)
            code = tl.where(here, c, code)
        old = tl.load(lost + j * n + i, mask=inside, other=0.0)
        tl.debug_barrier()  # several threads have loaded the same scale: all before one stores
        tl.store(lost + j * n + i, old - moved, mask=inside)
        tl.store(codes + j * n + i, code, mask=inside)
        tl.store(scales + i, scale, mask=inside)
        tl.store(zeros + i, zero, mask=inside)


def fit(block, importance, shrink, refits):
    """rounding_cpu.fit."""
    scale, zero = block.new_empty(2, block.size(1))
    shrinks = _on_device(shrink, block.device)
    _launch(_fit_kernel, block, block, importance, shrinks, scale, zero, last=(len(shrink), refits))
    return scale, zero


def compensate(block, spread, scale, zero, codes, errors):
    """rounding_cpu.compensate."""
    _launch(_compensate_kernel, block, block, spread, scale, zero, codes, errors)


def descend(own, pull, lost, codes, scale, zero):
    """rounding_cpu.descend."""
    _launch(_descend_kernel, codes, own, pull, lost, codes, scale, zero)


def _launch(kernel, sized, *tensors, last=()):
    """Run a kernel over the columns of `sized` (group, n)."""
    assert all(tensor.is_contiguous() for tensor in tensors)
    group, n = sized.shape
    grid = (triton.cdiv(n, COLUMNS),)
    kernel[grid](*tensors, n, group, COLUMNS, *last, num_warps=max(1, group // 32))


@functools.cache
def _on_device(values, device):
    """A tuple of floats as a tensor there, sent once."""
    return torch.tensor(values, device=device)
