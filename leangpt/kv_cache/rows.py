"""The rows that a KV cache keeps, one a token: exact, or as integers of 8 or 4 bits.

Buffers are (B, G, S, D): B sequences, G heads, S slots, D numbers. They are allocated once and
written in place. Which slots a step writes and reads is the step's business (steps.py).
"""

import torch

from leangpt.system.errors import UserError

RECENT = 16  # newest tokens that quantised rows also keep exactly
ALL = slice(None)


class ExactRows:
    """data (B, G, S, D): rows in the model's own dtype."""

    def __init__(self, data):
        self.data = data

    def write(self, step, rows, start=0, batch=ALL):
        """Store rows (b, G, t, D): rows start : start + t of this step's, of the slice `batch`."""
        put(self.data, step.slots_of(start, rows.size(2)), rows, batch)

    def read(self, step, start, stop):
        """Slots start:stop as they are seen in this step, (B, G, stop - start, D), as a view."""
        return self.data[:, :, start:stop]

    def tensors(self):
        return [self.data]

    def kernel_buffers(self):
        """What cache_triton.py reads: rows, their scales and zeros, the recent ones, bits."""
        return self.data, self.data, self.data, 16


class QuantizedRows:
    """The same rows in 8 or 4 bits, x ~ code * scale + zero, beside an exact ring of the newest.

    codes (B, G, S, D) uint8, or (B, G, S, D/2) with number i in the low and number i + D/2 in the
    high half of byte i; scale_zero (B, G, S, 4) float16: scale, zero of numbers [0, D/2), then of
    the others; recent (B, G, RECENT, D). S is a multiple of RECENT, so that a row's place in the
    ring survives the cache's wrap. Raises UserError for an odd D.
    """

    def __init__(self, batch, heads, slots, width, device, dtype, bits):
        if width % 2:
            raise UserError(f"kv_bits={bits} halves each head: its size {width} is odd")
        self.bits, self.levels = bits, 2**bits - 1
        shape = (batch, heads, slots)
        self.codes = torch.zeros(*shape, width * bits // 8, device=device, dtype=torch.uint8)
        self.scale_zero = torch.zeros(*shape, 4, device=device, dtype=torch.float16)
        self.recent = torch.zeros(batch, heads, RECENT, width, device=device, dtype=dtype)

    def write(self, step, rows, start=0, batch=ALL):
        """As ExactRows.write."""
        slots = step.slots_of(start, rows.size(2))
        codes, scale_zero = self.quantize(rows)
        put(self.codes, slots, codes, batch)
        put(self.scale_zero, slots, scale_zero, batch)
        if isinstance(slots, slice):
            first = max(slots.start, step.slots.stop - RECENT)  # older ones would be overwritten
            if first < slots.stop:
                ring = torch.arange(first, slots.stop, device=rows.device) % RECENT
                self.recent[batch].index_copy_(2, ring, rows[:, :, first - slots.start :])
        else:
            put(self.recent, slots % RECENT, rows, batch)

    def quantize(self, rows):
        """(B, G, t, D) -> codes (B, G, t, D or D/2) uint8, scale_zero (B, G, t, 4) float16."""
        x = rows.float().unflatten(-1, (2, -1))  # (B, G, t, 2, D/2)
        low, high = x.aminmax(dim=-1, keepdim=True)
        zero = low.half()
        scale = ((high - zero) / self.levels).clamp_(min=1e-7).half()
        codes = ((x - zero) / scale + 0.5).floor_().clamp_(0, self.levels).to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., 0, :] | (codes[..., 1, :] << 4)
        else:
            codes = codes.flatten(-2)
        return codes, torch.cat([scale, zero], dim=-1).flatten(-2)

    def read(self, step, start, stop):
        """As ExactRows.read: dequantised, but the recent ones, which are exact."""
        codes = self.codes[:, :, start:stop]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-2)  # (B, G, n, 2, D/2)
        else:
            codes = codes.unflatten(-1, (2, -1))
        dtype = self.recent.dtype
        scale_zero = self.scale_zero[:, :, start:stop].to(dtype).unflatten(-1, (2, 2, 1))
        scale, zero = scale_zero.unbind(-2)  # (B, G, n, 2, 1) each
        x = torch.addcmul(zero, codes.to(dtype), scale).flatten(-2)
        ring = torch.arange(start, stop, device=x.device) % RECENT
        recent = (step.newest_age[:, start:stop] < RECENT)[:, None, :, None]
        return torch.where(recent, self.recent[:, :, ring], x)

    def tensors(self):
        return [self.codes, self.scale_zero]

    def kernel_buffers(self):
        return self.codes, self.scale_zero, self.recent, self.bits


def put(buffer, slots, rows, batch):
    """buffer (B, G, S, D) gets rows (b, G, t, D) at a slice, or at one slot a batch row."""
    if isinstance(slots, slice):
        buffer[batch, :, slots] = rows
    else:
        slots = slots.expand(-1, buffer.size(1), -1, buffer.size(3))
        buffer.scatter_(2, slots, rows.to(buffer.dtype))
