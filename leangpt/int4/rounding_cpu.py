"""The steps of int4/rounding.py in C (rounding_cpu.c): some 100 times fewer passes over memory.

`library()` is None where there is no C compiler (system/c_library.py); int4/rounding.py has the
same steps as PyTorch operators. All tensors are contiguous float32 on the CPU, n a multiple of
LANES.
"""

import ctypes
import functools
from pathlib import Path

import torch

from leangpt.system import c_library

SOURCE = Path(__file__).with_name("rounding_cpu.c")
LANES = 16  # rows that go side by side


class Sizes(ctypes.Structure):
    """int4/rounding_cpu.c's."""

    _fields_ = [("group", ctypes.c_int64), ("n", ctypes.c_int64), ("threads", ctypes.c_int32)]


@functools.cache
def library():
    """The steps, built if need be; None where they cannot be."""
    loaded = c_library.load(SOURCE, (*c_library.FLAGS, "-Wno-psabi"))
    if loaded is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.fit.argtypes = [pointer] * 4 + [number] * 2 + [pointer] * 2
    loaded.compensate.argtypes = loaded.descend.argtypes = [pointer] * 7
    loaded.fit.restype = loaded.compensate.restype = loaded.descend.restype = None
    return loaded


def fit(block, importance, shrink, refits):
    """Weights block (group, n), importance (group) of sum 1 -> scale and zero (n)."""
    scale, zero = block.new_empty(2, block.size(1))
    shrink = torch.tensor(shrink)
    library().fit(
        _sizes(block),
        *_pointers(block, importance, shrink),
        len(shrink),
        refits,
        *_pointers(scale, zero),
    )
    return scale, zero


def compensate(block, spread, scale, zero, codes, errors):
    """GPTQ's step: block (group, n), spread (group, group); fills codes and errors (group, n)."""
    library().compensate(_sizes(block), *_pointers(block, spread, scale, zero, codes, errors))


def descend(own, pull, lost, codes, scale, zero):
    """Coordinate descent in place: own (group, group), the others (group, n) or (n)."""
    library().descend(_sizes(codes), *_pointers(own, pull, lost, codes, scale, zero))


def _sizes(block):
    return ctypes.byref(Sizes(*block.shape, torch.get_num_threads()))


def _pointers(*tensors):
    assert all(t.is_contiguous() for t in tensors)
    return [t.data_ptr() for t in tensors]
