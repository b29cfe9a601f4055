"""Clock, machine and commit: what every measured row says of itself."""

import functools
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]  # the checkout's, or what the package is installed in
SOURCES = ("*.py", "*.c", "*.h")  # a change of these is another program


def timed(fn, device="cpu"):
    """Seconds of one call, everything queued on the device included."""
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    """Wait for everything queued on a CUDA device; nothing elsewhere."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values):
    """(median, interquartile range) of some numbers."""
    values = torch.tensor(values, dtype=torch.float64)
    low, median, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return median, high - low


def describe_machine(device="cpu"):
    """Name of the device that computes: the GPU's, or the processor's with the thread count."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


@functools.cache  # the commit the run began with
def commit_id():
    """Short id of the checked-out commit, with + where Python or C files differ from it.

    Only the repository that holds these files is believed: a copy of them, installed somewhere
    inside another one, has ''. The environment variable LEANGPT_COMMIT has precedence: on a machine
    that got a copy, set it to the output of this function where they came from.
    """
    if told := os.environ.get("LEANGPT_COMMIT"):
        return told
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments):
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        top = git("rev-parse", "--show-toplevel")
        if not top or Path(top).resolve() != ROOT:
            return ""
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    except OSError:  # no git on this machine
        return ""
    return commit and commit + ("+" if changed else "")
