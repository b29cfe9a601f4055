"""Gradients of several backward passes summed in 8 or 4 bits a number, for one update.

Accumulation keeps a gradient of every weight from the first backward to the step: as many bytes as
the weights, and in bfloat16 a sum whose small terms are rounded away. `sum_in_bits` has a hook on
each parameter add its gradient to codes (momentum.py: blocks of 32 with one scale, 1.06 bytes a
number in 8 bits, 0.56 in 4) and free it. The dither keeps the sum unbiased: its expectation is the
sum of the gradients, its error uniform within half a code of every addition.

optimizer.step() then has what updates inside backward lack: all gradients, before any weight has
moved. They are clipped by their own norm, and an inf or nan among them leaves every weight as it
was. Sums become gradients a few tensors at a time, and are freed as they are used.
"""

import torch

from leangpt.optim.backward.taken import TakenGradients
from leangpt.optim.base import MemoryOptimizer
from leangpt.optim.momentum import BLOCK, dequantize, new_momentum, quantize_into, round_to_bfloat16
from leangpt.system.errors import UserError

BITS = (8, 4)
CHUNK = 1 << 22  # numbers that are added at a time, in float32; a multiple of BLOCK
TOGETHER = 1 << 24  # numbers of small tensors that are updated together
MOST = 1 << 12  # backward passes a step whose dithers are told apart


def sum_in_bits(
    optimizer: MemoryOptimizer, bits: int, max_norm: float = 0.0, names: dict | None = None
) -> MemoryOptimizer:
    """Make `loss.backward()` add gradients to sums of 8 or 4 bits; returns the optimizer.

    Keep the usual loop: any number of backward passes, optimizer.step(), zero_grad (which drops
    sums that no step has used). p.grad is None all the while.

    max_norm: the sums are scaled by min(1, max_norm / their norm); 0: they are not. names: of
    parameters, {parameter: name}, for messages. Raises UserError for bits that are not 8 or 4, and
    for what cannot work: several processes, sharded and float16 parameters, GradScaler, closures.
    optimizer.step() then raises GradientNotFinite, no weight having moved.
    """
    if bits not in BITS:
        raise UserError(f"gradient_bits must be 8 or 4, not {bits!r}")
    optimizer.strategy = GradientSums(optimizer, bits, max_norm, names)
    return optimizer


class Sum:
    """The sum of one parameter's gradients, in codes and scales."""

    def __init__(self, like, bits, first_key):
        state = new_momentum(like, bits)
        self.codes, self.scales = state["momentum"], state["momentum_scale"]
        self.shape, self.key, self.terms, self.finite = like.shape, first_key, 0, None

    def chunks(self):
        """(start, stop, codes, scales) of runs of numbers; codes and scales as batches of one."""
        numel = self.shape.numel()
        for start in range(0, numel, CHUNK):
            stop = min(start + CHUNK, numel)
            rows = slice(start // BLOCK, -(-stop // BLOCK))
            yield start, stop, self.codes[None, rows], self.scales[None, rows]

    def read(self, codes, scales, numbers):
        """A chunk's numbers as they were last written: (1, numbers) float32."""
        return dequantize(codes, scales, self.key + self.terms - 1, torch.Size((1, numbers)))

    def add(self, grad):
        """One more term."""
        grad = grad.reshape(-1)
        for start, stop, codes, scales in self.chunks():
            value = grad[None, start:stop].float()
            if self.terms:
                value = value + self.read(codes, scales, stop - start)
            quantize_into(codes, scales, self.key + self.terms, value)
        # a block with inf or nan in it has such a scale, until something else is added
        finite = self.scales.isfinite().all()
        self.finite = finite if self.finite is None else self.finite & finite
        self.terms += 1

    def square(self):
        """The square of its norm, () float32."""
        parts = [self.read(c, s, stop - a).square_().sum() for a, stop, c, s in self.chunks()]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=self.codes.device)

    def total(self, dtype, scale, generator):
        """The sum times `scale` (None: 1) in a dtype; bfloat16 is rounded without bias."""
        out = torch.empty(self.shape.numel(), dtype=dtype, device=self.codes.device)
        for start, stop, codes, scales in self.chunks():
            value = self.read(codes, scales, stop - start)[0]
            value = value if scale is None else value.mul_(scale)
            narrow = dtype == torch.bfloat16
            out[start:stop] = round_to_bfloat16(value, generator()) if narrow else value
        return out.view(self.shape)


class GradientSums(TakenGradients):
    """Sums of the gradients since the last step(), and the step that uses them."""

    option = "gradient_bits"

    def __init__(self, optimizer, bits, max_norm, names=None):
        super().__init__(optimizer, max_norm, names)
        self.bits, self.sums = bits, {}

    def bytes_of(self, p):
        """Bytes of the sum of a parameter's gradients."""
        planned = new_momentum(p.detach().to("meta"), self.bits)
        return sum(tensor.numel() * tensor.element_size() for tensor in planned.values())

    def take(self, optimizer, p, group):
        """Add a gradient to its sum."""
        if p not in self.sums:
            # dithers of a step: the same after a resume, another one for every term
            key = (optimizer.state[p].get("step", 0) * MOST + MOST) % (1 << 31)
            self.sums[p] = Sum(p, self.bits, key)
        self.sums[p].add(p.grad)

    def step(self, optimizer, closure):
        """Clip the sums and update every weight that has one. Raises GradientNotFinite."""
        self.refuse(optimizer, closure)
        sums = self.sums
        if not sums:
            return
        first = next(iter(sums)).device
        finite = torch.stack([one.finite.to(first) for one in sums.values()])
        if not finite.all():
            bad = [p for p, good in zip(sums, finite) if not good]
            self.forget()
            self.report(optimizer, bad)
        scale = None
        if self.max_norm:
            squares = torch.stack([one.square().to(first) for one in sums.values()])
            self.norm = squares.sum().sqrt()
            scale = (self.max_norm / (self.norm + 1e-6)).clamp_(max=1.0)
        work, size = [], 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p not in sums:
                    continue
                if work and size + p.numel() > TOGETHER:
                    self.update(optimizer, work)
                    work, size = [], 0
                here = None if scale is None else scale.to(p.device)
                p.grad = sums.pop(p).total(p.dtype, here, self.generator(optimizer, p))
                work.append((p, group))
                size += p.numel()
        self.update(optimizer, work)

    def update(self, optimizer, work):
        """Update [(parameter, its group)] and free their gradients."""
        optimizer.update_all(work)
        for p, _ in work:
            p.grad = None

    def generator(self, optimizer, p):
        """() -> the generator that rounds a sum to bfloat16, seeded by the step."""
        key = 0x50A5 + optimizer.state[p].get("step", 0)
        made = []

        def generator():
            if not made:
                made.append(torch.Generator(p.device).manual_seed(key))
            return made[0]

        return generator

    def forget(self):
        """Drop all sums."""
        self.sums.clear()
