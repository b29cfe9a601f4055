"""Saved activations in pinned host memory, copied both ways beside the computation.

`stash` starts a copy to the host on a stream of its own and returns a handle; `fetch` brings it
back, and starts the copy of the handle stashed before it, which backward will ask for next. So
the GPU holds about two layers' inputs however many layers there are.

Memory is always the computing stream's, which waits for a copy before it lets go of what was
copied. Lent to the other stream (`record_stream`) it would return when the GPU is done, and by
then the host, which runs ahead, has long asked for the memory of all other layers.
"""

import weakref

import torch

_streams = {}  # device -> the stream of its copies
_newest = None  # weak reference to the handle stashed last: handles go with their graph


class Handle:
    def __init__(self, x, before):
        self.device, self.before = x.device, before
        self.x = x.detach()  # while the device has it: until the next stash, and around fetch
        self.host = _host_like(x)
        self._copy(self.host, self.x)

    def _copy(self, to, source):
        """Queue a copy behind all that the device has been asked for so far."""
        stream = _stream(self.device)
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


def _stream(device):
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _host_like(x):
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)


def stash(x):
    """Copy x (a CUDA tensor) to pinned host memory; the returned handle is for `fetch`.

    Call it before the work that may run beside the copy. The tensor stashed before is let go.
    """
    global _newest
    before = _newest and _newest()
    if before is not None and before.x is not None:
        before.wait()
        before.x = None
    handle = Handle(x, _newest)
    _newest = weakref.ref(handle)
    return handle


def fetch(handle):
    """The stashed tensor back on its device; the one stashed before it is started too."""
    handle.bring_back()
    handle.wait()
    x, handle.x = handle.x, None
    before = handle.before and handle.before()
    if before is not None:
        before.bring_back()
    return x
