"""Which tensors the CPU kernels of step_cpu.c take, and how they are called.

A `MatrixTable` is all such matrices of one group, of any shapes: one C call a step. What does not
change between steps (every address but the gradients') is kept, as dispatch.py says for how long.
Where there is no C compiler (system/c_library.py), PyTorch's own operators do the same in more
passes over memory.

Each step gives the same bits again, whatever the number of threads and in another process too.
"""

import ctypes
import functools
import math
import platform
from pathlib import Path

import torch

from leangpt.optim.arithmetic import HUGEST
from leangpt.optim.momentum import BLOCK
from leangpt.system import c_library

SOURCE = Path(__file__).with_name("step_cpu.c")
FLAGS = (*c_library.FLAGS, "-fno-trapping-math")
if platform.machine() == "x86_64":  # the fewer instructions, the more reads are under way
    FLAGS += ("-mprefer-vector-width=512",)
TILES = 32  # row tiles of a matrix, about ...
TILE_ROWS = (16, 256)  # ... of at least and at most so many rows
MOMENTUM = {torch.float32: 32, torch.int8: 8}


class Matrix(ctypes.Structure):
    """step_cpu.c's."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("param", "grad", "momentum", "scales", "row", "column")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "tile")),
    ]


class Step(ctypes.Structure):
    """step_cpu.c's."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("fresh", "share", "decay", "rate")),
        ("bits", ctypes.c_int32),
        ("step", ctypes.c_uint32),
    ]


@functools.cache
def library():
    """The kernels, built if need be; None where they cannot be."""
    loaded = c_library.load(SOURCE, FLAGS)
    if loaded is None:
        return None
    pointer, number, real, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
    loaded.adamsn.argtypes = [pointer, number, pointer, *[real] * 3, int32, int32]
    loaded.adafactor.argtypes = [
        pointer,
        number,
        pointer,
        pointer,
        number,
        number,
        *[real] * 4,
        int32,
    ]
    loaded.adamsn.restype = loaded.adafactor.restype = None
    return loaded


def supports(item):
    """Can the kernels take this item, simple as dispatch.py asks? PyTorch takes the others."""
    p, state = item.param, dict(item.state)
    if p.device.type != "cpu":
        return False
    momentum, scales = state.pop("momentum", None), state.pop("momentum_scale", None)
    if momentum is not None and momentum.dtype not in MOMENTUM:
        return False
    if scales is not None and math.prod(p.shape[1:]) % BLOCK:  # a block lies in one row
        return False
    plain = [p, item.grad, *state.values()]
    return all(t.dtype == torch.float32 for t in plain) and library() is not None


def stacks_of(items, most=None):
    """Supported items -> MatrixTables of the same group, step and momentum's bits."""
    alike = {}
    for item in items:
        alike.setdefault((id(item.group), item.step, bits_of(item)), []).append(item)
    return [MatrixTable(same) for same in alike.values()]


def bits_of(item):
    """Bits of an item's stored momentum; 0: it has none."""
    momentum = item.state.get("momentum")
    return 0 if momentum is None else MOMENTUM[momentum.dtype]


class MatrixTable:
    """Matrices of one group, and their addresses as the kernels read them."""

    def __init__(self, items):
        self.items, self.group, self.bits = items, items[0].group, bits_of(items[0])
        self.table = (Matrix * len(items))()
        for entry, item in zip(self.table, items):
            fill(entry, item)
        tiles = max(-(-entry.rows // entry.tile) for entry in self.table)
        self.most = (tiles, max(entry.columns for entry in self.table))  # tiles, columns

    @property
    def step(self):
        return self.items[0].step

    def begin(self, beta, rate, share=0.0):
        """(table, matrices, Step) of this step: the first three arguments of every kernel."""
        for entry, item in zip(self.table, self.items):
            entry.grad = item.grad.data_ptr()
        decay = 1 - float(self.group["lr"]) * float(self.group["weight_decay"])
        self.now = Step(1 - beta, share, decay, rate, self.bits, self.step)
        return ctypes.addressof(self.table), len(self.items), ctypes.addressof(self.now)

    def adamsn(self, share, weight, correction2):
        """One step of AdamSN with a second moment per row or run; the numbers of its schedule."""
        (beta1, beta2), group = self.group["betas"], self.group
        library().adamsn(
            *self.begin(beta1, float(group["lr"]) * weight, share),
            1 - beta2,
            correction2,
            group["eps"],
            group["norm"] == "mean",
            torch.get_num_threads(),
        )

    def adafactor(self, fresh):
        """One step of Adafactor."""
        group, (tiles, columns) = self.group, self.most
        scratch = torch.empty(tiles * (columns + 2) + columns)
        clip = math.inf if group["clip"] is None else group["clip"]
        library().adafactor(
            *self.begin(group["momentum"], float(group["lr"])),
            scratch.data_ptr(),
            tiles,
            columns,
            fresh,
            group["eps"][0],
            HUGEST,
            clip,
            torch.get_num_threads(),
        )


def fill(entry, item):
    """Write an item's sizes and all addresses but the gradient's into its Matrix.

    A matrix with AdamSN's second moments of shorter runs is one of so many shorter rows.
    """
    p, state = item.param, item.state
    entry.rows = state["second_moment"].numel() if "second_moment" in state else p.shape[0]
    entry.columns = p.numel() // entry.rows
    least, most = TILE_ROWS
    entry.tile = max(least, min(most, entry.rows // TILES))
    entry.param = p.data_ptr()
    for field, *names in (
        ("momentum", "momentum"),
        ("scales", "momentum_scale"),
        ("row", "second_moment", "row_mean_square"),
        ("column", "column_mean_square"),
    ):
        for name in names:
            if name in state:
                setattr(entry, field, state[name].data_ptr())
