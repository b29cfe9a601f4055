"""Measuring memory exactly: the bytes the allocator handed out, never the resident set size.

The resident set of a process holds the libraries, the allocator's free lists and whatever the
kernel has not taken back yet, so a saving of 100 MB can be invisible in it. What a policy really
costs is the largest sum of tensor bytes alive at one moment, and every allocator can tell that.
"""

import gc
import os

import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch._C._profiler import RecordScope

from leangpt.system.errors import UserError

# Kineto, the library under the profiler, otherwise announces each start and stop on stderr. It
# reads the variable at its first use, which is later than this line.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def tensor_bytes(tensors):
    """Bytes of the storages behind `tensors` (an iterable, or a module), each counted once.

    Views and tied weights share a storage and therefore add nothing. Of sharded tensors this
    process's rows count.
    """
    if isinstance(tensors, torch.nn.Module):
        tensors = [*tensors.parameters(), *tensors.buffers()]
    storages = {}
    for tensor in tensors:
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure_peak(fn, device="cpu"):
    """Call `fn()` once; return the bytes allocated at the peak beyond what stood before (int).

    What `fn` returns is alive at the end and therefore counted. Weights and inputs made before
    the call are not. Call `fn` once beforehand where the first call does more than the later ones
    (torch.compile, cuBLAS workspaces). Raises UserError for a device that is not cpu or cuda.
    """
    gc.collect()  # garbage of earlier calls must not be freed, and so deducted, during this one
    with PeakMeter(device) as meter:
        result = fn()
        del result
    return meter.peak


class PeakMeter:
    """The peak of a stretch of code: `with PeakMeter(device) as meter: ...; meter.peak`, in bytes.

    On CUDA it is the caching allocator's own peak counter. On the CPU there is no counter; but
    the profiler hears of every block the allocator gives and takes back, whichever operator,
    fused kernel, compiled graph or autograd thread asked for it, so that the running sum of its
    events is exact. A block that stood before and is freed inside is not deducted on the CPU: the
    profiler does not know its size. Nor does it see memory that bypasses the allocator, as the
    packing buffers inside BLAS do.

    An event costs about 0.5 us while running, 10 us and 2.5 KB when read. Long stretches should
    call `tick()` now and then, outside of any backward, to read and drop the events so far.
    """

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(f"memory can be measured on cpu and cuda, not on {self.device.type}")
        self.peak = 0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.alive = {}  # address -> bytes, of the blocks allocated since the start
            self.now = 0
            self._start()
        return self

    def tick(self):
        """Take in what happened so far; `peak` is up to date afterwards."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self._take_in(_disable_profiler())
            self._start()

    def __exit__(self, *exception):
        if self.device.type == "cuda":
            self.tick()
        else:
            self._take_in(_disable_profiler())

    def _start(self):
        # Only the memory events are wanted. Operators are recorded by scope, so a scope that
        # never occurs leaves them all out: a tenth of the cost of an ordinary profile.
        profile = torch.autograd.profiler.profile(profile_memory=True)
        config, activities = profile.config(), {torch.autograd.ProfilerActivity.CPU}
        _prepare_profiler(config, activities)
        _enable_profiler(config, activities, {RecordScope.LITE_INTERPRETER})

    def _take_in(self, profile):
        for event in profile.experimental_event_tree():  # in the order of time
            block = event.typed[1]
            if event.name != "[memory]" or block.device.type != "cpu":
                continue
            if block.alloc_size > 0:
                # an address that is alive was freed by a thread that the profiler does not hear
                self.now -= self.alive.get(block.ptr, 0)
                self.alive[block.ptr] = block.alloc_size
                self.now += block.alloc_size
                self.peak = max(self.peak, self.now)
            else:
                # The profiler's own table keeps addresses of earlier profiles, whose sizes can be
                # stale; ours holds this stretch only, so a block from before it counts nothing.
                self.now -= self.alive.pop(block.ptr, 0)
