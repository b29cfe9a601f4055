"""Memory on pages of 2 MB, for what every decoding step on a CPU reads from end to end.

The processor's own fetching ahead stops at the end of a page and its table of pages has a few
thousand entries, so a step that streams 100 MB through pages of 4 KB takes a tenth longer than one
through pages of 2 MB. Where Linux hands out huge pages to those who ask (`madvise`, most systems'
setting), asking is all there is to it; elsewhere memory is as it always was.

A huge page must be filled by one piece of memory, so many small tensors have to share one.
"""

import ctypes
import functools
import mmap

import torch

PAGE = 2**21  # x86-64's; elsewhere the request asks for more or less than could be used
LEAST = 4 * PAGE  # less has too few whole pages to matter


def empty(size, device="cpu"):
    """size bytes, not set to anything: (size,) uint8. Below LEAST, or off the CPU, ordinary."""
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    if memory.device.type == "cpu" and size >= LEAST and _madvise() is not None:
        first = -(-memory.data_ptr() // PAGE) * PAGE  # whole pages only
        last = (memory.data_ptr() + size) // PAGE * PAGE
        _madvise()(first, last - first, mmap.MADV_HUGEPAGE)  # refused: pages stay small
    return memory


def gather_(modules, names):
    """Move the CPU buffers called `names` of all these modules into one piece of memory."""
    found = [
        (module, name)
        for module in modules
        for name in names
        if getattr(module, name) is not None and getattr(module, name).device.type == "cpu"
    ]
    sizes = [-(-getattr(module, name).nbytes // 64) * 64 for module, name in found]
    if sum(sizes) < LEAST:
        return
    for (module, name), memory in zip(found, empty(sum(sizes)).split(sizes)):
        old = getattr(module, name)
        new = memory[: old.nbytes].view(old.dtype).view(old.shape)
        setattr(module, name, new.copy_(old))


@functools.cache
def _madvise():
    """The C library's madvise(address, bytes, advice), or None where there is no such advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
