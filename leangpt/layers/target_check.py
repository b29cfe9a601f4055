"""Targets outside the vocabulary are an error; on CUDA one that nobody waits for.

A kernel that trusts a wrong target reads and writes outside its row. Asking the device before each
step would stall it, and an assertion on the device takes the whole process with it. So the lowest
and highest wrong target are kept on the device, copied to pinned memory behind the step's own work,
and looked at when a later call finds the copy done.
"""

import torch
from torch._compile import _disable_dynamo as graph_break

from leangpt.system.errors import UserError


@graph_break
def outside_vocabulary(targets, counted, vocab_size):
    """Which targets (N,) int64 are neither classes nor ignored.

    counted (N,) bool: those that are not ignored. On the CPU: raises UserError, or returns None. On
    CUDA: a mask (N,) bool, and a UserError only for what an earlier call left behind.
    """
    outside = counted & ((targets < 0) | (targets >= vocab_size))
    if not targets.is_cuda:
        if outside.any():
            raise _error(*targets[outside].aminmax(), vocab_size)
        return None
    if not torch.cuda.is_current_stream_capturing():
        report = _reports.setdefault((targets.device, vocab_size), Report(targets.device))
        report.add(targets.masked_fill(~outside, 0))
        if wrong := report.arrived():
            raise _error(*wrong, vocab_size)
    return outside


_reports = {}  # (device, vocab_size) -> Report: news outlives the call that made it


class Report:
    """The lowest and highest of the wrong targets of all calls, on their way to the host."""

    def __init__(self, device):
        self.seen = torch.zeros(2, dtype=torch.int64, device=device)  # lowest, minus the highest
        self.host = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        self.copied = None  # event of the copy under way

    def add(self, wrong):
        """wrong (N,) int64: the targets outside the vocabulary, zero elsewhere."""
        if len(wrong):
            low, high = wrong.aminmax()
            torch.minimum(self.seen, torch.stack((low, -high)), out=self.seen)
        if self.copied is None:  # else it would be written while it is read
            self.host.copy_(self.seen, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def arrived(self):
        """(lowest, highest) if a finished copy tells of a wrong target, once; else None."""
        if self.copied is None or not self.copied.query():
            return None
        self.copied = None
        low, high = self.host[0].item(), -self.host[1].item()
        if low == high == 0:
            return None
        self.seen.zero_()
        return low or high, high or low


def _error(low, high, vocab_size):
    low, high = int(low), int(high)
    found = f"target {low} is" if low == high else f"targets from {low} to {high} are"
    return UserError(
        f"{found} outside the vocabulary of {vocab_size} classes, 0 to {vocab_size - 1}; rows that "
        "should not count need ignore_index (-100 unless set)"
    )
