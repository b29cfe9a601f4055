"""Momentum kept in 32, 16, 8 or 4 bits a number.

8 and 4 bits are integer codes in blocks of 32 with one bfloat16 scale a block (8.5 and 4.5 bits a
number in all), as block-wise optimizer states are since Dettmers et al. 2021 (arXiv 2110.02861).
A momentum moves by (1 - beta) of a gradient a step, often less than half a code: rounding to
nearest would lose that for ever. So the rounding is dithered, and the dither is taken off again
where the codes are read (subtractive dither: Roberts 1962; Schuchman 1964):

    code  = round(x / scale + v)          v uniform in [-1/2, 1/2)
    value = scale (code - v)

The error is uniform within half a code whatever x is: its mean is zero and its variance scale²/12,
half of what stochastic rounding has on average. But for zero: it has a code of its own, the lowest,
and stays zero. A weight that never had a gradient must not move, and MuonSN makes the columns of
its momentum equally long: noise in the column of a dead unit would become a step of full length.
v costs no memory. It follows from what both
sides know, the bits of the scale and the step of the writing: the first v of a block is their
hash, each next one is the golden ratio further (modulo 1).

The scale is rounded up to bfloat16, so that no value falls outside the codes. 16 bits are
bfloat16 numbers rounded stochastically: E[stored] = value there too.

Every function works on a batch: the first dimension N counts independent tensors.
"""

import torch

from leangpt.optim.arithmetic import zeros_as

BLOCK = 32  # numbers that share a scale
LEVELS = {8: 127, 4: 7}  # the largest code; the smallest is its negative, and one below is zero
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: its multiples mod 2^32 lie evenly spread
MOMENTUM_BITS = (32, 16, 8, 4)
FORMAT = 2  # of codes: 1 had none for zero


def new_momentum(like, bits):
    """State of a zero momentum for the tensor `like`: a dict of one or two tensors.

    32: float32 (float64 for a float64 tensor), 16: bfloat16, both in the tensor's own shape; 8:
    int8 codes (blocks, 32), 4: uint8 (blocks, 16), two codes a byte; both with bfloat16 scales
    (blocks, 1). The last block is padded with zeros.
    """
    if bits in (32, 16):
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        dtype = wide if bits == 32 else torch.bfloat16
        return {"momentum": zeros_as(like, dtype)}
    blocks = -(-like.numel() // BLOCK)
    width, dtype = (BLOCK, torch.int8) if bits == 8 else (BLOCK // 2, torch.uint8)
    zero = -LEVELS[bits] - 1 if bits == 8 else 0  # two nibbles of the lowest code, stored as 0
    codes = torch.full((blocks, width), zero, dtype=dtype, device=like.device)
    scales = torch.zeros(blocks, 1, dtype=torch.bfloat16, device=like.device)
    return {"momentum": codes, "momentum_scale": scales}


def update_momentum(state, grad, beta, step, generator):
    """momentum <- beta * momentum + (1 - beta) * grad in the batched `state`; returns it.

    grad: (N, ...) float32 or float64, not written to. step: how often the momentum was updated,
    this time included. Returns the new momentum before rounding, in grad's shape and dtype; the
    caller must not write to it (at 32 bits it *is* the state). A state without momentum (beta = 0)
    returns grad itself. `generator()` gives the torch.Generator that rounds 16 bits.
    """
    if "momentum" not in state:
        return grad
    stored = state["momentum"]
    if stored.dtype == grad.dtype:
        return stored.lerp_(grad, 1 - beta)
    if stored.dtype == torch.bfloat16:
        value = stored.to(grad.dtype).lerp_(grad, 1 - beta)
        stored.copy_(round_to_bfloat16(value, generator()))
        return value
    value = dequantize(stored, state["momentum_scale"], step - 1, grad.shape).to(grad.dtype)
    value.lerp_(grad, 1 - beta)
    quantize_into(stored, state["momentum_scale"], step, value)
    return value


def dequantize(codes, scales, step, shape):
    """The numbers that `quantize_into` wrote at `step`: float32 of `shape`.

    codes: (N, blocks, 32) int8 or (N, blocks, 16) uint8; scales: (N, blocks, 1) bfloat16.
    """
    codes, levels = unpacked(codes)
    values = dither(scales, step).neg_().add_(codes).mul_(scales.float())
    values.masked_fill_(codes < -levels, 0.0)
    return values.flatten(1)[:, : shape[1:].numel()].reshape(shape)


def unpacked(codes):
    """Codes as int8, 32 a block, and the largest: (N, blocks, 32 or 16) -> ((N, blocks, 32), int).

    Of two in a byte the low nibble belongs to the block's first half, the high one to its second.
    """
    if codes.dtype == torch.int8:
        return codes, LEVELS[8]
    return torch.cat([codes & 15, codes >> 4], dim=-1).to(torch.int8) - 8, LEVELS[4]


def from_format_1(codes, scales, step):
    """Rewrite codes (blocks, 32 or 16) and scales (blocks, 1) in place as those of today.

    Before zero had a code, code = floor(x / scale + v) and value = scale (code + 1/2 - v).
    """
    codes, scales = codes[None], scales[None]
    values = dither(scales, step).neg_().add_(unpacked(codes)[0]).add_(0.5).mul_(scales.float())
    quantize_into(codes, scales, step, values)


def quantize_into(codes, scales, step, value):
    """Write `value` (N, ...) into codes and scales (see `dequantize`), rounding without bias."""
    levels = LEVELS[4 if codes.dtype == torch.uint8 else 8]
    flat = value.float().flatten(1)
    padding = scales.shape[1] * BLOCK - flat.shape[1]
    if padding:
        flat = torch.nn.functional.pad(flat, (0, padding))
    blocks = flat.view(*scales.shape[:2], BLOCK)
    # one bfloat16 step above the largest magnitude, so that |value / scale| <= levels
    scales.copy_(blocks.abs().amax(-1, keepdim=True).mul_((1 + 2**-7) / levels))
    rounded = blocks / scales.float().clamp_min_(torch.finfo(torch.float32).tiny)
    rounded = rounded.add_(dither(scales, step)).add_(0.5).floor_().clamp_(-levels, levels)
    rounded.masked_fill_(blocks == 0, -levels - 1)
    if codes.dtype == torch.int8:
        codes.copy_(rounded)
    else:
        nibbles = rounded.add_(8).to(torch.uint8)
        codes.copy_(nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4))


def dither(scales, step):
    """v of every number: scales (N, blocks, 1) -> (N, blocks, 32) float32 in [-1/2, 1/2).

    In 32-bit integers that wrap around, as in kernels/momentum_triton.py and kernels/step_cpu.c, so
    that a state means the same everywhere. step: an int, or a tensor that broadcasts to scales.
    """
    bits = scales.view(torch.int16).to(torch.int64) + step * GOLDEN
    lanes = torch.arange(BLOCK, device=scales.device).mul_(GOLDEN).to(torch.int32)
    words = mix(bits).to(torch.int32) + lanes
    return words.bitwise_right_shift_(8).to(torch.float32).mul_(2.0**-24)  # exact: 24 bits


def mix(x):
    """A bijection of 32 bits, each of which changes half of the others: x int64 -> int64.

    Wellons' lowbias32 (github.com/skeeto/hash-prospector); only the low 32 bits of x count.
    """
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> shift)) * multiplier
    x = x & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_to_bfloat16(value, generator):
    """Round float32 `value` to one of its two bfloat16 neighbours so that the mean is `value`.

    A bfloat16 is the upper half of a float32: adding a uniform 16-bit integer to the lower half
    carries into the upper one with just the probability wanted; then the lower half is dropped.
    A nan stays one, also CUDA's, whose bits are all set: a carry would make a zero of it.
    """
    value = value.float()
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    rounded = noise.add_(bits).bitwise_and_(-65536).view(torch.float32)
    return torch.where(value.isnan(), value, rounded, out=rounded).to(torch.bfloat16)
