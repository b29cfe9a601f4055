"""What this machine's processor is good at, and how its memory is best handed out."""

import ctypes
import functools

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@functools.cache
def fast_bfloat16():
    """Has the CPU matrix products in bfloat16 that beat float32's: AMX tiles?

    Elsewhere they are little faster, or emulated and far slower.
    """
    return torch.cpu._is_amx_tile_supported()


def keep_freed_memory():
    """Let malloc keep freed blocks of up to 32 MiB for the next step -> whether it will.

    A training step frees all its activations at its end. By default glibc then returns them to the
    kernel, and the next step waits for every page to be mapped and zeroed again. Larger blocks are
    returned as ever. Does nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 1 << 25) and mallopt(M_TRIM_THRESHOLD, 1 << 30))
