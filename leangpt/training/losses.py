"""Losses of iterations, read seldom: each reading waits for the device."""

import math

import torch


class NotFinite(RuntimeError):
    """A number that a run cannot go on with. The message says what it is, and the iteration."""

    def __init__(self, what: str, iteration: int):
        super().__init__(f"{what} is not finite at iteration {iteration}")


class Losses:
    """Losses of the iterations since they were last read, still on the device."""

    def __init__(self, runtime):
        self.runtime = runtime
        self.waiting = {}  # iteration -> scalar tensor

    def add(self, iteration: int, loss: torch.Tensor):
        self.waiting[iteration] = loss

    def read(self) -> list[float]:
        """Those added since the last call, means over all processes, which call this together.

        Raises NotFinite.
        """
        if not self.waiting:
            return []
        losses = self.runtime.mean_over_processes(torch.stack([*self.waiting.values()]).tolist())
        for iteration, loss in zip(self.waiting, losses):
            if not math.isfinite(loss):
                raise NotFinite("the loss", iteration)
        self.waiting.clear()
        return losses
