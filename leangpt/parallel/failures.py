"""When a process of a run is gone: the others notice, one of them says so, and all end.

torchrun ends the others too, with SIGTERM and half a minute later with SIGKILL, so that one that
waits for the dead in a kernel of NCCL's does not wait longer. With --max-restarts it starts all
of them again; such a run goes on from its last checkpoint, if that is of this very launch.
"""

import os

import torch.distributed as dist

SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")


def is_lost_process(error: BaseException) -> bool:
    """Is this exception what a collective raises where another process has ended?"""
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in SIGNS)


def first_to_say(what: str) -> bool:
    """Is this process the first of the run that asks so? True where nobody can know."""
    try:
        # torchrun's own process keeps the store: it outlives all of them
        return dist.distributed_c10d._get_default_store().add(f"said {what} {attempt()}", 1) == 1
    except (RuntimeError, ValueError):
        return True


def attempt() -> int:
    """How often torchrun has restarted this run's processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch() -> str | None:
    """A name that torchrun's processes share over its restarts; None outside torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    # "none" is torchrun's for whoever names nothing: then the process that started this one
    return f"process {os.getppid()}" if name == "none" else name
