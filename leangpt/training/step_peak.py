"""The exact peak of a training step, also on a CPU, where no allocator counts by itself.

Resident memory hardly tells optimizers apart: it holds the libraries, and a free list that grew at
start-up hides what a step allocates later. What a step needs is the same from step to step once
the optimizer has its state, so one early step is measured.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from leangpt.memory.meter import PeakMeter, tensor_bytes
from leangpt.parallel.shards import has_shards

MEASURED = 2  # the step that is measured, counted from 0: kernels and state are there by then


def step_peak(
    step: Callable[[Callable[[], None]], Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[Any, int]:
    """Run one step -> (what it returned, bytes allocated at its peak: all there was, on the CPU).

    step(tick): forward, backward and update, with a call of tick() before each micro-batch, which
    keeps the meter small; numbers are bitwise those of a step that is not measured. Counted are
    parameters, buffers and state, which stand before, the gradients that DistributedDataParallel
    keeps in C++, and every block that the step allocates, activations above all. gloo's threads are
    not heard: a message that one of them frees counts until its place is used again.
    """
    states = (value for state in optimizer.state.values() for value in state.values())
    standing = tensor_bytes(
        [*model.parameters(), *model.buffers(), *filter(torch.is_tensor, states)]
    )
    standing += bucket_bytes(model)
    # Held until the meter is off, as the profiler complains on stderr of a block that it meets when
    # it is freed: the gradient norm of the last step, say, where the new one takes its place.
    before = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, Parameter)]
    with PeakMeter("cpu") as meter:
        result = step(meter.tick)
    del before
    return result, standing + meter.peak


def bucket_bytes(model: torch.nn.Module) -> int:
    """Bytes of the gradients of DistributedDataParallel, which stand; 0 where nobody has it."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or has_shards(model):
        return 0
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


class StepPeak:
    """The peak of a run's steps as far as it is known: `bytes`, or None before and elsewhere.

    CUDA's allocator counts all the time; on a CPU one early step is measured.
    """

    def __init__(self, runtime, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.runtime, self.model, self.optimizer = runtime, model, optimizer
        self.done = 0  # steps of this process
        self.measured = None

    @property
    def bytes(self) -> int | None:
        if self.runtime.device_type == "cuda":
            return torch.cuda.max_memory_allocated(self.runtime.device)
        return self.measured

    def of(self, step: Callable[..., Any], *held: Any) -> Any:
        """Run step(), or step(tick) when it is to be measured -> what it returned.

        held: what the step replaces of the one before. It lives until the step is over, for the
        meter does not know the size of blocks from before it and would say so.
        """
        self.done += 1
        if self.runtime.device_type != "cpu" or self.done != MEASURED + 1:
            return step()
        result, self.measured = step_peak(step, self.model, self.optimizer)
        return result
