"""C kernels for the processor at hand: built with `cc` on first use, in a second, and kept.

Compiled files go to the cache folder, one for each source, set of flags and processor. Each ends
with its own checksum, which a program's loader ignores: a file cut short, by a full disk or a
crash, would otherwise end every process that maps it with SIGBUS.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from leangpt.system.cache import cache_folder

# not -ffast-math: linking with it would change how the whole process treats tiny numbers
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC")
DIGEST = hashlib.sha256().digest_size


def load(source, flags=FLAGS, headers=()):
    """The C file `source` (a Path) as a ctypes.CDLL, compiled if need be; None where that fails.

    headers: those of ours that it includes, Paths. It shares PyTorch's OpenMP threads. Only Linux
    is tried.
    """
    if platform.system() != "Linux":
        return None
    try:
        contents = [path.read_bytes() for path in (source, *headers)]
        recipe = b"".join(contents) + repr((flags, processor_flags())).encode()
        path = cache_folder() / f"{source.stem}-{hashlib.sha256(recipe).hexdigest()[:16]}.so"
        if not usable(path, source):
            build(source, (*flags, *(f"-I{header.parent}" for header in headers)), path)
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


def usable(path, source):
    """Is there a build at `path`, whole, and by somebody whose code would be run anyway?

    That is this user, root and the owner of the source; nobody else may be able to write to it.
    """
    try:
        status, content = path.stat(), path.read_bytes()
    except OSError:
        return False
    trusted = status.st_uid in (os.getuid(), 0, source.stat().st_uid)
    whole = hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]
    return trusted and not status.st_mode & 0o022 and whole


def build(source, flags, path):
    """Compile `source` to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = f"{folder}/kernels.o", Path(folder) / "kernels.so"
        run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=120)
        run(["cc", *flags, "-c", str(source), "-o", compiled])
        # without -fopenmp: the process has PyTorch's OpenMP threads, two sets would be in each
        # other's way
        run(["cc", "-shared", compiled, "-o", str(linked), "-lm"])
        content = linked.read_bytes()
        linked.write_bytes(content + hashlib.sha256(content).digest())
        linked.chmod(0o755)
        os.replace(linked, path)
