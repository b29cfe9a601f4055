"""The rows of a KV cache as a kernel reads and writes them on CUDA, in Triton (see rows.py).

Quantised rows are read as they are: codes go straight into the tensor cores, scales and zeros are
applied to the products. A code of 4 bits becomes a float by setting it as the last bits of a power
of two, 128 in bfloat16 and 1024 in float16: one instruction; the power is taken off in the zeros.
"""

from leangpt.system.triton import INTERPRETED, tl, triton

# Four bytes -> eight floats, the low and the high halves of the bytes: 8 instructions.
CODES_TO_FLOATS = """{
.reg .b32 a, b;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
lop3.b32 $0, a, 0x000f000f, POWER, 0xea;
lop3.b32 $1, b, 0x000f000f, POWER, 0xea;
shr.u32 a, a, 4;
shr.u32 b, b, 4;
lop3.b32 $2, a, 0x000f000f, POWER, 0xea;
lop3.b32 $3, b, 0x000f000f, POWER, 0xea;
}"""

if triton is not None:
    INTERPRETED_ = tl.constexpr(INTERPRETED)
    ASM_BFLOAT16 = tl.constexpr(CODES_TO_FLOATS.replace("POWER", "0x43004300"))
    ASM_FLOAT16 = tl.constexpr(CODES_TO_FLOATS.replace("POWER", "0x64006400"))

    @triton.jit
    def turn(low, high, cos, sin):
        """rope.apply_rope on the two halves of rows: in float32, then rounded."""
        first, second = low.to(tl.float32), high.to(tl.float32)
        turned = first * cos - second * sin
        return turned.to(low.dtype), (second * cos + first * sin).to(high.dtype)

    @triton.jit
    def quantize_half(x, BITS: tl.constexpr):
        """Half a row x (HALF,) -> its codes, scale and zero, the latter float16."""
        zero = tl.min(x, 0).to(tl.float16)
        scale = tl.maximum((tl.max(x, 0) - zero.to(tl.float32)) / (2**BITS - 1), 1e-7)
        scale = scale.to(tl.float16)
        code = tl.floor((x - zero.to(tl.float32)) / scale.to(tl.float32) + 0.5)
        return tl.minimum(tl.maximum(code, 0.0), 2**BITS - 1).to(tl.uint8), scale, zero

    @triton.jit
    def store_row(
        low,
        high,
        rows,
        meta,
        recent,
        row,
        slot,
        S,
        columns,
        HALF: tl.constexpr,
        BITS: tl.constexpr,
        R: tl.constexpr,
    ):
        """Write one row's halves (HALF,) to its slot, in every form that the cache keeps."""
        at = row * S + slot
        if BITS == 16:
            tl.store(rows + at * (2 * HALF) + columns, low)
            tl.store(rows + at * (2 * HALF) + HALF + columns, high)
        else:
            into = recent + (row * R + slot % R) * (2 * HALF) + columns
            tl.store(into, low)
            tl.store(into + HALF, high)
            low_codes, low_scale, low_zero = quantize_half(low.to(tl.float32), BITS)
            high_codes, high_scale, high_zero = quantize_half(high.to(tl.float32), BITS)
            tl.store(meta + at * 4, low_scale)
            tl.store(meta + at * 4 + 1, low_zero)
            tl.store(meta + at * 4 + 2, high_scale)
            tl.store(meta + at * 4 + 3, high_zero)
            if BITS == 4:
                tl.store(rows + at * HALF + columns, low_codes | (high_codes << 4))
            else:
                tl.store(rows + at * (2 * HALF) + columns, low_codes)
                tl.store(rows + at * (2 * HALF) + HALF + columns, high_codes)

    @triton.jit
    def floats_of_codes(packed, dtype: tl.constexpr):
        """uint8 -> its low and its high 4 bits as floats, each plus the power of two."""
        if INTERPRETED_:
            power: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
            packed = packed.to(tl.int16)
            return (
                ((packed & 15) | power).to(dtype, bitcast=True),
                ((packed >> 4) | power).to(dtype, bitcast=True),
            )
        elif dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                ASM_BFLOAT16,
                "=r,=r,=r,=r,r",
                [packed],
                (tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            return tl.inline_asm_elementwise(
                ASM_FLOAT16,
                "=r,=r,=r,=r,r",
                [packed],
                (tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )

    @triton.jit
    def load_halves(
        rows, at, mask, columns, HALF: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr
    ):
        """Two tiles of rows or codes as dtype; 4-bit codes come with a power of two.

        at, mask (N, 1) and columns (1, HALF), or (1, N) and (HALF, 1) for tiles (HALF, N): loaded
        like that, and not transposed afterwards, they pass through shared memory asynchronously.
        """
        if BITS == 4:
            packed = tl.load(rows + at * HALF + columns, mask, 0)
            low, high = floats_of_codes(packed, dtype)
        else:
            at = rows + at * (2 * HALF) + columns
            low, high = tl.load(at, mask, 0).to(dtype), tl.load(at + HALF, mask, 0).to(dtype)
        return low, high

    @triton.jit
    def load_meta(words, at, mask):
        """Scale and zero of both halves, (N,) float32 each, in one load a row."""
        word = tl.load(words + at, mask, 0)
        low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
        low_scale = low.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low_zero = (low >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high_scale = high.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high_zero = (high >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return low_scale, low_zero, high_scale, high_zero
