"""What the optimizers' CUDA kernels share, in Triton: momentum in 32, 16, 8 or 4 bits as
optim/momentum.py has it, and weights rounded without bias.

A tile is (NB, 32): NB blocks of the 32 numbers that share a scale of quantised momenta. Noise is
Philox (Salmon et al. 2011) of (place in the tensor, the parameter's number, step): a step repeats
bit by bit, in another process too. Arithmetic is float32.
"""

from leangpt.system.triton import tl, triton

if triton is not None:

    @triton.jit
    def noise(at, number, step):
        """Four tiles of 32 random bits; seven rounds pass TestU01's BigCrush."""
        return tl.philox(0x5EED, at.to(tl.uint32), number.to(tl.uint32), step, 0, 7)

    @triton.jit
    def round_bfloat16(x, word):
        """x rounded to one of its bfloat16 neighbours without bias; still float32."""
        bits = x.to(tl.uint32, bitcast=True) + (word & 0xFFFF)
        rounded = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)  # a nan whose bits are all set would become a zero

    @triton.jit
    def store_weight(param, at, mask, value, word, ROUND: tl.constexpr):
        if ROUND:
            value = round_bfloat16(value, word)
        tl.store(param + at, value.to(param.dtype.element_ty), mask)

    @triton.jit
    def dither(scale, step):
        """optim/momentum.py's, of blocks with these scales (NB,) bfloat16: (NB, 32) float32."""
        x = scale.to(tl.uint16, bitcast=True).to(tl.uint32) + step.to(tl.uint32) * 0x9E3779B9
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
        words = x[:, None] + tl.arange(0, 32).to(tl.uint32)[None, :] * 0x9E3779B9
        return (words.to(tl.int32, bitcast=True) >> 8).to(tl.float32) * 2.0**-24

    @triton.jit
    def average(entry, at, mask, block, x, fresh, word, step, BITS: tl.constexpr, NB: tl.constexpr):
        """momentum <- (1 - fresh) momentum + fresh x; returns it before rounding.

        at (NB, 32) places in the tensor; block (NB,) numbers of the blocks; mask (NB, 32).
        """
        address = tl.load(entry + 2)
        if BITS == 0:
            new = x
        elif BITS == 32:
            momentum = address.to(tl.pointer_type(tl.float32))
            momentum = tl.multiple_of(momentum, 16)
            old = tl.load(momentum + at, mask, 0.0)
            new = old + fresh * (x - old)
            tl.store(momentum + at, new, mask)
        elif BITS == 16:
            momentum = address.to(tl.pointer_type(tl.bfloat16))
            momentum = tl.multiple_of(momentum, 16)
            old = tl.load(momentum + at, mask, 0.0).to(tl.float32)
            new = old + fresh * (x - old)
            tl.store(momentum + at, round_bfloat16(new, word).to(tl.bfloat16), mask)
        else:
            scales = tl.load(entry + 3).to(tl.pointer_type(tl.bfloat16))
            some = tl.max(mask.to(tl.int32), 1) > 0  # rows are whole blocks
            scale = tl.load(scales + block, some, 0.0)
            LEVELS: tl.constexpr = 127.0 if BITS == 8 else 7.0
            if BITS == 8:
                codes = address.to(tl.pointer_type(tl.int8))
                codes = tl.multiple_of(codes, 16)
                old = tl.load(codes + at, mask, -128).to(tl.float32)
            else:  # low nibble: the block's first half; high nibble: its second
                codes = address.to(tl.pointer_type(tl.uint8))
                codes = tl.multiple_of(codes, 16)
                lane = tl.arange(0, 32)[None, :]
                pair = tl.load(codes + block[:, None] * 16 + lane % 16, mask, 0).to(tl.int32)
                old = (((pair >> ((lane // 16) * 4)) & 15) - 8).to(tl.float32)
            value = (old - dither(scale, step - 1)) * scale.to(tl.float32)[:, None]
            old = tl.where(old < -LEVELS, 0.0, value)  # the lowest code is zero's
            new = old + fresh * (x - old)
            scale = (tl.max(tl.abs(new), 1) * ((1 + 2**-7) / LEVELS)).to(tl.bfloat16)
            tl.store(scales + block, scale, some)
            v = dither(scale, step)
            scale = tl.maximum(scale.to(tl.float32), 1.1754943508222875e-38)
            code = tl.floor(new / scale[:, None] + v + 0.5)
            code = tl.minimum(tl.maximum(code, -LEVELS), LEVELS)
            code = tl.where(new == 0.0, -LEVELS - 1, code).to(tl.int32)
            if BITS == 8:
                tl.store(codes + at, code.to(tl.int8), mask)
            else:
                halves = tl.reshape(code + 8, (NB, 2, 16))
                pair = tl.sum(halves * (1 + 15 * tl.arange(0, 2))[None, :, None], 1)
                into = block[:, None] * 16 + tl.arange(0, 16)[None, :]
                tl.store(codes + into, pair.to(tl.uint8), some[:, None])
        return new

    @triton.jit
    def pointers(entry, P: tl.constexpr, G: tl.constexpr):
        param = tl.load(entry).to(tl.pointer_type(P))
        grad = tl.load(entry + 1).to(tl.pointer_type(G))
        return tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
