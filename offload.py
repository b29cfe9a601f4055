"""Saved activations in pinned host memory, copied both ways beside the computation.

`stash` starts a copy to the host on a stream of its own and returns a handle; `fetch` brings it
back, and starts the copy of the handle stashed before it, which backward will ask for next. So
the GPU holds about two layers' inputs however many layers there are.
"""

import torch

_streams = {}  # device -> the stream of its copies
_pending = []  # handles whose tensors are on the host, oldest first


class Handle:
    def __init__(self, x):
        self.device, self.coming = x.device, None
        stream = _stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not reused before the copy is done

    def start(self):
        """Begin the copy back, once."""
        if self.coming is None:
            with torch.cuda.stream(_stream(self.device)):
                self.coming = self.host.to(self.device, non_blocking=True)


def _stream(device):
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def stash(x):
    """Copy x (a CUDA tensor) to pinned host memory; the returned handle is for `fetch`."""
    handle = Handle(x)
    _pending.append(handle)
    return handle


def fetch(handle):
    """The stashed tensor back on its device; the one stashed before it is started too."""
    handle.start()
    current = torch.cuda.current_stream(handle.device)
    current.wait_stream(_stream(handle.device))
    x = handle.coming
    x.record_stream(current)
    if handle in _pending:
        place = _pending.index(handle)
        if place:
            _pending[place - 1].start()
        del _pending[place:]
    return x
