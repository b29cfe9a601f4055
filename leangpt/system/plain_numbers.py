"""NumPy's scalars in a checkpoint, read as plain numbers, without NumPy's own unpickling.

nanoGPT's forks save them where a loss was averaged by NumPy. A pickled one names a function, a
dtype and bytes; here stand-ins for those two read numbers alone.
"""

import re

import numpy as np
import torch

FOREIGN = re.compile(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)")


class _NumberType:
    """Stands for a pickled numpy.dtype."""

    def __init__(self, code, *rest):
        self.code, self.order = code, "|"

    def __setstate__(self, state):
        self.order = state[1]


def _number(kind, data=b""):
    """Stands for numpy's scalar(dtype, bytes) -> int, float or bool."""
    if not isinstance(kind, _NumberType) or not re.fullmatch(r"[fiub]\d+", str(kind.code)):
        raise ValueError(f"a numpy value of type {getattr(kind, 'code', kind)!r}")
    return np.frombuffer(data, np.dtype(f"{kind.order}{kind.code}"), count=1)[0].item()


def numbers_allowed():
    """A context in which torch.load(weights_only=True) reads NumPy's scalars as plain numbers."""
    scalars = [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return torch.serialization.safe_globals([*scalars, (_NumberType, "numpy.dtype")])


def foreign_object(error: Exception) -> str | None:
    """The name of what torch.load refused to unpickle, where that is why it failed."""
    found = FOREIGN.search(str(error))
    return found and found[1]
