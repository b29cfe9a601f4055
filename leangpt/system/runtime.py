"""Where and how a script runs: device, number type, process group, seeds. Shared by the scripts.

One process by itself, or one of several started by `torchrun`, which sets RANK, LOCAL_RANK and
WORLD_SIZE. Everything random in training is a function of (seed, iteration, process) through
`iteration_seed`, never of what ran before: that is what makes an interrupted run continue exactly.
"""

import gc
import os
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from leangpt.system.errors import UserError, exit_cleanly

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("auto", "nccl", "gloo")
DATA_STREAM = 0  # iteration_seed's stream for the data order; process r has stream 1 + r


@dataclass
class Runtime:
    """Where a run computes, in which numbers, and which of its processes this is."""

    device: torch.device
    reason: str  # why this device
    dtype: torch.dtype  # what autocast computes in
    rank: int = 0
    world_size: int = 1
    context_parallel: int = 1  # neighbouring processes that share each sequence
    abandoned: bool = False  # is another process of the group gone?

    @property
    def data_parallel(self):
        """How many shares an iteration's batch is divided into."""
        return self.world_size // self.context_parallel

    @property
    def data_rank(self):
        """Which of them is this process's."""
        return self.rank // self.context_parallel

    @property
    def device_type(self):
        """'cpu', 'cuda' or 'mps'."""
        return self.device.type

    @property
    def is_main(self):
        """True in the one process that prints and writes files."""
        return self.rank == 0

    def autocast(self):
        """Context in which matrix products run in `dtype`; does nothing for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def synchronize(self):
        """Wait until the device has done all that was queued (the CPU always has)."""
        if self.device_type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device_type == "mps":
            torch.mps.synchronize()

    def seed(self, seed):
        """Seed what this process draws from here on (dropout, stochastic rounding)."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is 40 times slower
        if self.device_type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device_type == "mps":
            torch.mps.manual_seed(seed)

    def mean_over_processes(self, values):
        """Mean over the processes of each of `values`, a list of floats -> list of floats."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return (tensor / self.world_size).tolist()

    def most_of_processes(self, number: int) -> int:
        """The largest that a process has of a number."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def check_alike(self, what, number):
        """Raise UserError where the processes have different numbers, called `what`."""
        mean = self.mean_over_processes([float(number)])[0]
        if mean != number:
            raise UserError(
                f"{what} is {number} here and {mean:g} on the average of {self.world_size} "
                "processes: out_dir must be one folder that all of them see"
            )

    def describe(self):
        """One line: device and why, dtype, threads or processes."""
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        parts = [f"{self.device} ({self.reason})", name]
        if self.device_type == "cpu":
            parts.append(f"{torch.get_num_threads()} threads")
        if self.world_size > 1:
            parts.append(f"{self.world_size} processes ({dist.get_backend()})")
        return ", ".join(parts)

    def close(self):
        """Leave the process group, if there is one."""
        if dist.is_initialized() and not self.abandoned:
            gc.collect()  # what still holds the group (DDP's buckets) goes first
            dist.destroy_process_group()

    def abandon(self):
        """Another process is gone: `close` then waits for nobody."""
        self.abandoned = True


def is_main_process():
    """Is this the process that writes files: the only one, or the first that torchrun started?

    For what happens before `setup_runtime`; then it is `Runtime.is_main`.
    """
    return os.environ.get("RANK", "0") == "0"


def is_first_of_machine():
    """Is this the first process of the run on its machine, or the only one?"""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def run_script(main):
    """errors.exit_cleanly, and one of several processes then leaves without Python's teardown."""
    status = 0
    try:
        exit_cleanly(main)
    except SystemExit as leaving:
        status = leaving.code or 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        leave(status)
    sys.exit(status)


def leave(status=0):
    """End this process, one of several, without Python's teardown.

    gloo's threads outlive `destroy_process_group` (collectives keep the group registered). One that
    drops the last reference to a tensor takes the interpreter's lock for it; where the interpreter
    is being taken down by then, that ends the thread inside a destructor, and so the process with
    SIGABRT (pytorch issue 190489): torchrun would report a finished run as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk, a stream that is closed
            stream.flush()
    os._exit(status)


ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # what a user may have set


def use_expandable_segments():
    """Ask CUDA's allocator for segments that grow, unless the user has set it up: tensors of many
    sizes leave holes in others. The allocator reads this once, when anything of it is first used.
    """
    if not ALLOCATOR & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def setup_runtime(device="auto", dtype="auto", seed=1337, backend="auto", context_parallel=1):
    """Choose device and dtype, seed torch, join torchrun's process group -> Runtime.

    device: auto | cpu | cuda | cuda:N | mps; auto is CUDA where there is one, else the CPU.
    dtype: auto | float32 | bfloat16 | float16; auto is bfloat16 on a GPU that has it, float16 on
    an older one, float32 elsewhere. backend: auto (nccl on CUDA, gloo else) | nccl | gloo.
    context_parallel: how many processes share each sequence, a divisor of their number. Every
    process is seeded alike. Raises UserError for what is unknown or not there.
    """
    world_size = _environment_int("WORLD_SIZE", 1)
    if world_size % context_parallel:
        raise UserError(
            f"context_parallel={context_parallel} must divide the number of processes, which "
            f"is {world_size}"
        )
    rank, local_rank = _environment_int("RANK", 0), _environment_int("LOCAL_RANK", 0)
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    chosen, reason = _choose_device(device, local_rank if distributed else None)
    chosen_dtype = _choose_dtype(dtype, chosen)
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; choose one of: {', '.join(BACKENDS)}")
    if chosen.type == "cuda":
        use_expandable_segments()
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is asked for
    if distributed:
        if backend == "nccl" and chosen.type != "cuda":
            raise UserError(f"backend='nccl' needs CUDA, not device {chosen}; use 'gloo' or 'auto'")
        if backend == "auto":
            backend = "nccl" if chosen.type == "cuda" else "gloo"
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"RANK and WORLD_SIZE are set, {name} is not: start several "
                    "processes with torchrun, or unset all of them"
                )
        _join(backend, rank, world_size)
    torch.manual_seed(seed)
    return Runtime(chosen, reason, chosen_dtype, rank, world_size, context_parallel)


def _join(backend, rank, world_size):
    """Join the process group. torchrun keeps one store of addresses over its restarts: each attempt
    has a place of its own in it, or processes would call on those that are gone."""
    attempt = _environment_int("TORCHELASTIC_RESTART_COUNT", 0)
    if not attempt:
        dist.init_process_group(backend)
        return
    store, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def iteration_seed(seed, iteration, stream):
    """The seed of everything random in one iteration, distinct for each (seed, stream) in use.

    stream: DATA_STREAM, or 1 + rank for what one process draws itself (dropout). The CPU's
    generator keeps 32 bits of a seed: consecutive iterations never collide within a run, and runs
    of neighbouring seeds lie a million iterations apart.
    """
    return (seed * 1_000_003 + stream * 0x9E3779B1 + iteration) % 2**32


def _environment_int(name, default):
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise UserError(
            f"environment variable {name}={value!r} is not a number; start several "
            "processes with torchrun"
        )
    return int(value)


def _choose_device(name, local_rank):
    """(torch.device, why). local_rank is None outside torchrun."""
    has_cuda = torch.cuda.is_available()
    reason = "asked for"
    if name == "auto":
        reason = "CUDA is available" if has_cuda else "no CUDA device found"
        name = "cuda" if has_cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device='mps' was asked for, but this machine has none; use device=auto")
    if device.type == "cuda":
        if not has_cuda:
            raise UserError(
                f"device={name!r} was asked for, but no CUDA device is available; "
                "use device=cpu or device=auto"
            )
        index = device.index if device.index is not None else 0
        if local_rank is not None:
            index = local_rank
        if index >= torch.cuda.device_count():
            raise UserError(
                f"cuda:{index} does not exist: this machine has "
                f"{torch.cuda.device_count()} CUDA devices"
            )
        device = torch.device("cuda", index)
        reason += f", {torch.cuda.get_device_name(device)}"
    return device, reason


def _choose_dtype(name, device):
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; choose one of: auto, {', '.join(DTYPES)}")
    return DTYPES[name]
