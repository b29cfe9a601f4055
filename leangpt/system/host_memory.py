"""How much memory of the host a process may still take, and how much there is in all."""

import os
from pathlib import Path

try:
    import resource
except ImportError:  # Windows: a process has no limit of its own there
    resource = None

CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that this process can still take: what the system says is available, of that what its
    control group and its own limit (`ulimit -v`) leave; None where nothing says so."""
    said = _meminfo("MemAvailable"), _left_of_group(), _left_of_limit()
    return min((size for size in said if size is not None), default=_physical())


def total_memory() -> int | None:
    """Bytes of the machine, or of the control group where that is less; None: unknown."""
    said = _meminfo("MemTotal"), _number(CGROUP / "memory.max")
    return min((size for size in said if size is not None), default=_physical())


def _meminfo(name):
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration, ValueError):
        return None


def _left_of_group():
    most, now = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if most is None or now is None:
        return None
    return most - now + _reclaimable()


def _reclaimable():
    """Bytes of files in the group's page cache, which it gives up for others."""
    try:
        words = (CGROUP / "memory.stat").read_text().split()
        return sum(int(words[words.index(name) + 1]) for name in ("inactive_file", "active_file"))
    except (OSError, ValueError):
        return 0


def _left_of_limit():
    if resource is None:
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return most
    return max(0, most - pages * os.sysconf("SC_PAGE_SIZE"))


def _number(path):
    """A file's number; None where there is no file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _physical():
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # the first of them on Windows
        return None
