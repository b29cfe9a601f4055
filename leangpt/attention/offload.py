"""Saved activations in pinned host memory, copied both ways beside the computation.

A `HostStack` belongs to the layers of one model. `stash` starts a copy to the host on a stream of
its own and returns a handle; `fetch` brings it back, and starts the copy of the handle stashed
before it, which backward will ask for next. So the GPU holds about two layers' inputs however many
layers there are.

Memory is always the computing stream's, which waits for a copy before it lets go of what was
copied. Lent to the other stream (`record_stream`) it would return when the GPU is done, and by
then the host, which runs ahead, has long asked for the memory of all other layers.
"""

import functools
import weakref

import torch


class HostStack:
    """What the layers of a model stashed, newest last. Layers without a common one do not know
    whose input backward wants next: right all the same, and slower."""

    def __init__(self):
        self.newest = None  # weak reference to the handle stashed last: handles go with their graph

    def stash(self, x: torch.Tensor) -> "Handle":
        """Copy x (a CUDA tensor) to pinned host memory; the returned handle is for `fetch`.

        Call it before the work that may run beside the copy. The tensor stashed before is let go.
        """
        before = self.newest and self.newest()
        if before is not None and before.x is not None:
            before.wait()
            before.x = None
        handle = Handle(x, self.newest)
        self.newest = weakref.ref(handle)
        return handle


class Handle:
    """A tensor that is on the host, on the device, or on its way."""

    def __init__(self, x, before):
        self.device, self.before = x.device, before
        self.x = x.detach()  # while the device has it: until the next stash, and around fetch
        self.host = _host_like(x)
        self._copy(self.host, self.x)

    def _copy(self, to, source):
        """Queue a copy behind all that the device has been asked for so far."""
        stream = _copy_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        self.copied = stream.record_event()

    def wait(self):
        """What the device is asked for from now on comes after the copy."""
        torch.cuda.current_stream(self.device).wait_event(self.copied)

    def bring_back(self):
        """Begin the copy to the device, unless x is there."""
        if self.x is None:
            self.x = torch.empty_like(self.host, device=self.device, pin_memory=False)
            self._copy(self.x, self.host)

    def fetch(self) -> torch.Tensor:
        """The stashed tensor back on its device; the one stashed before it is started too."""
        self.bring_back()
        self.wait()
        x, self.x = self.x, None
        before = self.before and self.before()
        if before is not None:
            before.bring_back()
        return x


@functools.cache
def _copy_stream(device):
    return torch.cuda.Stream(device)


def _host_like(x):
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
