"""The exact peak of a training step, also on a CPU, where no allocator counts by itself.

Resident memory hardly tells optimizers apart: it holds the libraries, and a free list that grew at
start-up hides what a step allocates later. What a step needs is the same from step to step once
the optimizer has its state, so one early step is measured.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

from leangpt.memory.meter import PeakMeter, tensor_bytes

MEASURED = 2  # the step that is measured, counted from 0: kernels and state are there by then


def step_peak(
    step: Callable[[Callable[[], None]], Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[Any, int]:
    """Run one step -> (what it returned, bytes allocated at its peak: all there was, on the CPU).

    step(tick): forward, backward and update, with a call of tick() before each micro-batch, which
    keeps the meter small; numbers are bitwise those of a step that is not measured. Counted are
    parameters, buffers and state, which stand before, and every block that the step allocates,
    gradients and activations above all; not what C++ keeps from step to step by itself, as the
    buckets of DistributedDataParallel.
    """
    states = (value for state in optimizer.state.values() for value in state.values())
    standing = tensor_bytes(
        [*model.parameters(), *model.buffers(), *filter(torch.is_tensor, states)]
    )
    # Held until the meter is off, as the profiler complains on stderr of a block that it meets when
    # it is freed: the gradient norm of the last step, say, where the new one takes its place.
    before = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, Parameter)]
    with PeakMeter("cpu") as meter:
        result = step(meter.tick)
    del before
    return result, standing + meter.peak


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
