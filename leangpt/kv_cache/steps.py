"""A step of a KV cache: where its new tokens go, and which of the stored ones they see.

`KVCache.begin` chooses one of three:

    RunStep     t tokens, at the same slots in every sequence: a prefill, or one token while all
                sequences are equally long. The host's count bounds what is looked at.
    RowStep     one token a sequence, each at a slot of its own, taken from a device tensor.
    KernelStep  the same in Triton's kernel, which finds slots by itself (cache_triton.py).

All offer `positions`, what the model's embeddings and rotary angles want; the first two also
`slots` and what is seen of them.
"""

import torch


class Step:
    """positions (t,) or (B, t) int64 of the step's tokens; `visible` slots are looked at, of S."""

    kernel = None  # what attends instead of PyTorch

    def __init__(self, cache, positions, slots, visible):
        self.positions, self.slots, self.visible = positions, slots, visible
        self.cache = cache
        self.rows = positions if positions.ndim == 2 else positions[None]  # (B or 1, t)
        self._mask = self._age = None

    def slots_of(self, start, count):
        """Slots of rows start : start + count of this step's t."""
        raise NotImplementedError

    def sees_all(self):
        """Do all its tokens see all visible slots?"""
        return False

    def age(self, positions):
        """How long before positions (B or 1, n) each slot was written, (B or 1, n, visible).

        (p - s) mod S; more than p where the slot was never written.
        """
        slot_count = self.cache.slot_count
        return (positions[..., None] - self.cache.counter[: self.visible]) % slot_count

    @property
    def newest_age(self):
        """Ages (B or 1, visible) as seen by each sequence's newest token."""
        if self._age is None:
            self._age = self.age(self.rows[:, -1:])[:, 0]
        return self._age

    @property
    def mask(self):
        """What the step's tokens see, (B or 1, 1, t, visible) bool; None where that is all."""
        if self.sees_all():
            return None
        if self._mask is None:
            age = self.age(self.rows)
            seen = (age <= self.rows[..., None]) & (age < self.cache.max_length)
            self._mask = seen.unsqueeze(1)
        return self._mask

    def positions_of(self, start, stop):
        """The positions of the tokens in slots start:stop, (n,) or (B, n) int64."""
        positions = (self.rows[:, -1:] - self.newest_age[:, start:stop]).clamp_(min=0)
        return positions[0] if positions.size(0) == 1 else positions


class RunStep(Step):
    """t tokens of every sequence, all at the same positions: a prompt, or one token each."""

    def __init__(self, cache, t):
        end, first = cache.length + t, cache.length % cache.slot_count
        positions = torch.arange(cache.length, end, device=cache.counter.device)  # (t,)
        super().__init__(cache, positions, slice(first, first + t), min(end, cache.slot_count))
        # one token sees all, unless it writes over a slot while older ones wait to be written over
        past_the_end = end > cache.max_length and cache.slot_count > cache.max_length
        self.alone = t == 1 and not past_the_end

    def slots_of(self, start, count):
        return slice(self.slots.start + start, self.slots.start + start + count)

    def sees_all(self):
        return self.alone


class RowStep(Step):
    """One token of every sequence, each at a position of its own."""

    def __init__(self, cache, visible):
        positions = cache.positions[:, None]  # (B, 1), until cache.advance()
        slots = (positions % cache.slot_count)[:, :, None, None]
        super().__init__(cache, positions, slots, visible)

    def slots_of(self, start, count):
        return self.slots


class KernelStep(Step):
    """One token a sequence by the fused kernel, which counts positions on the device."""

    def __init__(self, cache):
        super().__init__(cache, cache.positions[:, None], None, cache.slot_count)
        self.kernel = cache.kernel
