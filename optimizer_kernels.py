"""CUDA kernels of the optimizers, in Triton: every weight is read and written once a step.

A launch takes all tensors of one shape: their addresses lie in a device table of int64, one line
of WIDTH a tensor (see `line` in optimizer_launch.py):

    0 parameter   1 gradient   2 momentum or its codes   3 scales   4, 5 second moments
    6 the parameter's number in the optimizer

A tile is (NB, 32): NB blocks of the 32 numbers that share a scale of quantised momenta
(quantized_state.py says how those lie in memory). Sums run in a fixed order and noise is Philox
(Salmon et al. 2011) of (place in the tensor, the parameter's number, step): a step repeats bit by
bit, in another process too. Arithmetic is float32.

TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for tests.
"""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
try:
    import triton
    import triton.language as tl

    AVAILABLE = INTERPRETED or torch.cuda.is_available()
except ImportError:
    AVAILABLE = False

WIDTH = 8  # int64 of a line of the table

if AVAILABLE:

    @triton.jit
    def noise(at, number, step):
        """Four tiles of 32 random bits; seven rounds pass TestU01's BigCrush."""
        return tl.philox(0x5EED, at.to(tl.uint32), number.to(tl.uint32), step, 0, 7)

    @triton.jit
    def round_bfloat16(x, word):
        """x rounded to one of its bfloat16 neighbours without bias; still float32."""
        bits = x.to(tl.uint32, bitcast=True) + (word & 0xFFFF)
        return ((bits >> 16) << 16).to(tl.float32, bitcast=True)

    @triton.jit
    def store_weight(param, at, mask, value, word, ROUND: tl.constexpr):
        if ROUND:
            value = round_bfloat16(value, word)
        tl.store(param + at, value.to(param.dtype.element_ty), mask)

    @triton.jit
    def dither(scale, step):
        """quantized_state.py's, of blocks with these scales (NB,) bfloat16: (NB, 32) float32."""
        x = scale.to(tl.uint16, bitcast=True).to(tl.uint32) + step.to(tl.uint32) * 0x9E3779B9
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
        words = x[:, None] + tl.arange(0, 32).to(tl.uint32)[None, :] * 0x9E3779B9
        return (words.to(tl.int32, bitcast=True) >> 8).to(tl.float32) * 2.0**-24

    @triton.jit
    def average(entry, at, mask, block, x, fresh, word, step, BITS: tl.constexpr,
                NB: tl.constexpr):
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

    # ------------------------------------------------------------------ AdamSN

    @triton.jit(do_not_specialize=["step"])
    def adamsn_rows(table, step, fresh1, fresh2, share, correction2, eps, factor, decay, rate,
                    ROWS, COLS: tl.constexpr, NB: tl.constexpr, BLOCKS: tl.constexpr,
                    P: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, ROUND: tl.constexpr):
        """One program, one row: gradient, momentum, v and weight in a single pass.

        v <- v + fresh2 (factor * sum g^2 - v), of the row or (BLOCKS) of each of its blocks;
        p <- decay p - rate (m + share (g - m)) / (sqrt(v / correction2) + eps)
        """
        program = tl.program_id(0)
        entry, row = table + (program // ROWS) * 8, program % ROWS
        param, grad = pointers(entry, P, G)
        number = tl.load(entry + 6)
        blocks = tl.arange(0, NB)
        column = blocks[:, None] * 32 + tl.arange(0, 32)[None, :]
        mask, at = column < COLS, row * COLS + column
        g = tl.load(grad + at, mask, 0.0).to(tl.float32)
        p = tl.load(param + at, mask, 0.0).to(tl.float32)
        block = row * (COLS // 32) + blocks
        seconds = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
        square = tl.sum(g * g, 1)
        if BLOCKS:
            v = second_moment(seconds + block, blocks * 32 < COLS, square * factor, fresh2)
            scale = (rate / (tl.sqrt(v / correction2) + eps))[:, None]
        else:
            v = second_moment(seconds + row, True, tl.sum(square, 0) * factor, fresh2)
            scale = rate / (tl.sqrt(v / correction2) + eps)
        w0, w1, _, _ = noise(at, number, step)
        m = average(entry, at, mask, block, g, fresh1, w0, step, BITS, NB)
        store_weight(param, at, mask, p * decay - (m + share * (g - m)) * scale, w1, ROUND)

    @triton.jit
    def second_moment(at, mask, square, fresh):
        """v <- v + fresh (square - v) there; returns it. At most the largest finite number."""
        v = tl.load(at, mask, 0.0)
        v = v + fresh * (tl.minimum(square, 3.4028234663852886e38) - v)
        tl.store(at, v, mask)
        return v

    # ------------------------------------------------------------------ Adafactor

    @triton.jit
    def place(ROWS, COLS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
        """(tensor, tile in it, tiles in it, row block, column block) of this program."""
        wide: tl.constexpr = (COLS + BLOCK - 1) // BLOCK
        tiles = (ROWS + TILE - 1) // TILE * wide
        program = tl.program_id(0)
        tile = program % tiles
        return program // tiles, tile, tiles, tile // wide, tile % wide

    @triton.jit
    def factor_sums(table, by_row, by_column, ROWS, COLS: tl.constexpr, TILE: tl.constexpr,
                    SUB: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr):
        """Sums of g^2 over the rows and columns of a tile of TILE rows by BLOCK columns.

        by_row (N, column blocks, ROWS), by_column (N, row blocks, COLS): partial sums.
        """
        tensor, tile, tiles, r, c = place(ROWS, COLS, TILE, BLOCK)
        wide: tl.constexpr = (COLS + BLOCK - 1) // BLOCK
        grad = tl.load(table + tensor * 8 + 1).to(tl.pointer_type(G))
        grad = tl.multiple_of(grad, 16)
        column = c * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((SUB, BLOCK), tl.float32)
        for start in range(0, TILE, SUB):
            row = r * TILE + start + tl.arange(0, SUB)
            mask = (row < ROWS)[:, None] & (column < COLS)[None, :]
            at = row[:, None] * COLS + column[None, :]
            g = tl.load(grad + at, mask, 0.0).to(tl.float32)
            square = g * g
            total += square
            tl.store(by_row + (tensor * wide + c) * ROWS + row, tl.sum(square, 1), row < ROWS)
        into = by_column + (tensor * (tiles // wide) + r) * COLS + column
        tl.store(into, tl.sum(total, 0), column < COLS)

    @triton.jit
    def factor_moments(table, by_row, by_column, means, fresh, eps1, ROWS: tl.constexpr,
                       HIGH: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
                       HUGEST: tl.constexpr):
        """R and C of one tensor from the partial sums, and mean(R) into means (N,).

        Axis 1 of the grid: 0 takes the rows, 1 + k the k-th 64 columns. HIGH, WIDE: row blocks
        and column blocks.
        """
        tensor, part = tl.program_id(0), tl.program_id(1)
        entry = table + tensor * 8
        if part == 0:  # (names differ between the branches: Triton would join them)
            second = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
            total = tl.zeros((1024,), tl.float32)
            for start in range(0, ROWS, 1024):
                row = start + tl.arange(0, 1024)
                mask = row < ROWS
                square = tl.zeros((1024,), tl.float32)
                for c in range(WIDE):
                    square += tl.load(by_row + (tensor * WIDE + c) * ROWS + row, mask, 0.0)
                square = tl.minimum(square / COLS + eps1, HUGEST)
                old = tl.load(second + row, mask, 0.0)
                new = old + fresh * (square - old)
                tl.store(second + row, new, mask)
                total += tl.where(mask, new, 0.0)
            tl.store(means + tensor, tl.sum(total, 0) / ROWS)
        else:
            columns = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
            column = (part - 1) * 64 + tl.arange(0, 64)
            some = column < COLS
            tiles = tl.zeros((32, 64), tl.float32)
            for first in range(0, HIGH, 32):
                r = first + tl.arange(0, 32)
                at = (tensor * HIGH + r)[:, None] * COLS + column[None, :]
                tiles += tl.load(by_column + at, (r < HIGH)[:, None] & some[None, :], 0.0)
            mean = tl.minimum(tl.sum(tiles, 0) / ROWS + eps1, HUGEST)
            before = tl.load(columns + column, some, 0.0)
            tl.store(columns + column, before + fresh * (mean - before), some)

    @triton.jit
    def factor_rms(table, means, squares, ROWS, COLS: tl.constexpr, TILE: tl.constexpr,
                   SUB: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr):
        """Sum of U^2 over a tile, U = g / sqrt(R C' / mean R): squares (N, tiles)."""
        tensor, tile, tiles, r, c = place(ROWS, COLS, TILE, BLOCK)
        entry = table + tensor * 8
        grad = tl.load(entry + 1).to(tl.pointer_type(G))
        grad = tl.multiple_of(grad, 16)
        by_row = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
        by_column = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
        by_column = tl.multiple_of(by_column, 16)
        column = c * BLOCK + tl.arange(0, BLOCK)
        mean = tl.load(means + tensor)
        weight = tl.rsqrt(tl.load(by_column + column, column < COLS, 1.0))
        total = tl.zeros((SUB,), tl.float32)
        for start in range(0, TILE, SUB):
            row = r * TILE + start + tl.arange(0, SUB)
            mask = (row < ROWS)[:, None] & (column < COLS)[None, :]
            at = row[:, None] * COLS + column[None, :]
            u = tl.load(grad + at, mask, 0.0).to(tl.float32) * weight[None, :]
            total += tl.sum(u * u, 1) * (mean / tl.load(by_row + row, row < ROWS, 1.0))
        tl.store(squares + tensor * tiles + tile, tl.sum(total, 0))

    @triton.jit(do_not_specialize=["step"])
    def factor_write(table, means, squares, step, clip, fresh, decay, rate, ROWS,
                     COLS: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr,
                     BLOCK: tl.constexpr, P: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
                     ROUND: tl.constexpr, TILES: tl.constexpr):
        """p <- decay p - rate U / max(1, RMS(U) / clip) of a tile, or the momentum of that.

        TILES: partial sums of U^2 a tensor; 0: no clipping.
        """
        tensor, tile, tiles, r, c = place(ROWS, COLS, TILE, BLOCK)
        entry = table + tensor * 8
        param, grad = pointers(entry, P, G)
        by_row = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
        by_column = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
        by_column = tl.multiple_of(by_column, 16)
        number = tl.load(entry + 6)
        shrink = 1.0
        if TILES > 0:
            total = tl.zeros((256,), tl.float32)
            for start in range(0, TILES, 256):
                part = start + tl.arange(0, 256)
                total += tl.load(squares + tensor * TILES + part, part < TILES, 0.0)
            mean_square = tl.sum(total, 0) / ROWS / COLS
            shrink = 1.0 / tl.maximum(tl.sqrt(mean_square) / clip, 1.0)
        mean = tl.load(means + tensor)
        A_ROW: tl.constexpr = BLOCK // 32
        NB: tl.constexpr = SUB * BLOCK // 32
        blocks, lane = tl.arange(0, NB), tl.arange(0, 32)
        column = (c * BLOCK + blocks % A_ROW * 32)[:, None] + lane[None, :]
        weight = tl.rsqrt(tl.load(by_column + column, column < COLS, 1.0))
        for start in range(0, TILE, SUB):
            row = r * TILE + start + blocks // A_ROW  # (NB,)
            mask = (row < ROWS)[:, None] & (column < COLS)
            at = row[:, None] * COLS + column
            g = tl.load(grad + at, mask, 0.0).to(tl.float32)
            p = tl.load(param + at, mask, 0.0).to(tl.float32)
            scale = tl.rsqrt(tl.load(by_row + row, row < ROWS, 1.0) / mean) * shrink
            w0, w1, _, _ = noise(at, number, step)
            block = row * (COLS // 32) + c * A_ROW + blocks % A_ROW
            u = g * weight * scale[:, None]
            u = average(entry, at, mask, block, u, fresh, w0, step, BITS, NB)
            store_weight(param, at, mask, p * decay - u * rate, w1, ROUND)

    # ------------------------------------------------------------------ MuonSN

    @triton.jit(do_not_specialize=["step"])
    def muon_ahead(table, ahead, step, momentum, nu, ROWS, COLS: tl.constexpr, NB: tl.constexpr,
                   G: tl.constexpr, BITS: tl.constexpr):
        """One row: momentum updated, and what is to be orthogonalised: ahead (N, ROWS, COLS)."""
        program = tl.program_id(0)
        entry, row = table + (program // ROWS) * 8, program % ROWS
        grad = tl.load(entry + 1).to(tl.pointer_type(G))
        grad = tl.multiple_of(grad, 16)
        number = tl.load(entry + 6)
        blocks = tl.arange(0, NB)
        column = blocks[:, None] * 32 + tl.arange(0, 32)[None, :]
        mask, at = column < COLS, row * COLS + column
        g = tl.load(grad + at, mask, 0.0).to(tl.float32)
        w0, _, _, _ = noise(at, number, step)
        block = row * (COLS // 32) + blocks
        m = average(entry, at, mask, block, g, 1 - momentum, w0, step, BITS, NB)
        m = g + nu * (m - g)
        into = ahead + program.to(tl.int64) * COLS + column
        tl.store(into, m.to(ahead.dtype.element_ty), mask)

    @triton.jit
    def muon_rows(table, update, scales, parts, fresh, correction, eps, ROWS, COLS: tl.constexpr,
                  NB: tl.constexpr):
        """One row of O: its second moment; scales, parts (N, ROWS): its scale, its part of RMS."""
        program = tl.program_id(0)
        entry, row = table + (program // ROWS) * 8, program % ROWS
        second = tl.load(entry + 4).to(tl.pointer_type(tl.float32)) + row
        column = tl.arange(0, NB * 32)
        at = update + program.to(tl.int64) * COLS + column
        o = tl.load(at, column < COLS, 0.0).to(tl.float32)
        square = tl.sum(o * o, 0) / COLS
        v = tl.load(second)
        v = v + fresh * (square - v)
        tl.store(second, v)
        scale = 1.0 / (tl.sqrt(v / correction) + eps)
        tl.store(scales + program, scale)
        tl.store(parts + program, scale * scale * square)

    @triton.jit
    def muon_rms(parts, factors, update_rms, ROWS: tl.constexpr):
        """factors (N,) = update_rms / RMS of the scaled update, from `parts` (N, ROWS)."""
        tensor = tl.program_id(0)
        total = tl.zeros((1024,), tl.float32)
        for start in range(0, ROWS, 1024):
            row = start + tl.arange(0, 1024)
            total += tl.load(parts + tensor * ROWS + row, row < ROWS, 0.0)
        rms = tl.maximum(tl.sqrt(tl.sum(total, 0) / ROWS), 1.0842021724855044e-19)
        tl.store(factors + tensor, update_rms / rms)

    @triton.jit(do_not_specialize=["step"])
    def muon_write(table, update, scales, factors, step, decay, rate, ROWS, COLS: tl.constexpr,
                   NB: tl.constexpr, P: tl.constexpr, ROUND: tl.constexpr):
        """One row: p <- decay p - rate * factor * scale * O."""
        program = tl.program_id(0)
        tensor, row = program // ROWS, program % ROWS
        entry = table + tensor * 8
        param = tl.load(entry).to(tl.pointer_type(P))
        param = tl.multiple_of(param, 16)
        number = tl.load(entry + 6)
        column = tl.arange(0, NB * 32)
        mask, at = column < COLS, row * COLS + column
        o = tl.load(update + program.to(tl.int64) * COLS + column, mask, 0.0).to(tl.float32)
        p = tl.load(param + at, mask, 0.0).to(tl.float32)
        scale = tl.load(scales + program) * tl.load(factors + tensor) * rate
        _, w1, _, _ = noise(at, number, step)
        store_weight(param, at, mask, p * decay - o * scale, w1, ROUND)
