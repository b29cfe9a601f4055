"""C kernels for the processor at hand: built with `cc` on first use, in a second, and kept.

Compiled files go to .cache beside this file, one for each source, set of flags and processor.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache"
# not -ffast-math: linking with it would change how the whole process treats tiny numbers
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC")


def load(source, flags=FLAGS):
    """The C file `source` as a ctypes.CDLL, compiled if need be; None where that fails.

    It shares PyTorch's OpenMP threads. Only Linux is tried.
    """
    if platform.system() != "Linux":
        return None
    try:
        recipe = source.read_bytes() + repr((flags, processor_flags())).encode()
        path = CACHE / f"{source.stem}-{hashlib.sha256(recipe).hexdigest()[:16]}.so"
        if not path.exists():
            build(source, flags, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def processor_flags():
    """What this processor can do, as Linux names it: x86's `flags`, ARM's `Features`."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.exists() else ""
    lines = (line.partition(":") for line in processor.splitlines())
    found = [value.split() for name, _, value in lines if name.strip() in ("flags", "Features")]
    return found[0] if found else [platform.machine()]


def build(source, flags, path):
    """Compile `source` to `path`, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = f"{folder}/kernels.o", f"{folder}/kernels.so"
        run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=120)
        run(["cc", *flags, "-c", str(source), "-o", compiled])
        # without -fopenmp: the process has PyTorch's OpenMP threads, two sets would be in each
        # other's way
        run(["cc", "-shared", compiled, "-o", linked, "-lm"])
        os.replace(linked, path)
