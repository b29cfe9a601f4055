"""Decoding kernels for CUDA, in Triton: store one token's K and V, attend from one token.

Both take every index from the device tensor `positions`, so one captured CUDA graph serves every
context length, and both read and write quantised rows as they are (kv_cache.QuantizedRows): the
4-bit codes go straight into the tensor cores, scales and zeros are applied to the products,

    q . k = sum over halves of  scale (q . codes) + zero sum(q)
    p . v = (p scale) . codes + sum(p zero).

The context is split over many programs and their partial results merged by logsumexp
("Flash-Decoding", Dao, Haziza, Massa, Sizov 2023). Where AVAILABLE is false or `fits` says no,
kv_cache.py does the same in plain PyTorch. TRITON_INTERPRET=1 runs the kernels on a CPU, slowly,
for tests.
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

BLOCK = 128  # slots a program looks at in one go
PROGRAMS = 528  # four for each of an H100's 132 processors


def fits(device, width, dtype):
    """Whether rows of `width` numbers and queries of `dtype` on a device suit the kernels."""
    half = width // 2
    here = AVAILABLE and (device.type == "cuda" or INTERPRETED)
    return (here and dtype in (torch.bfloat16, torch.float16)
            and half >= 16 and half & (half - 1) == 0)


if AVAILABLE:

    @triton.jit
    def store_half(x, codes, scale_zero, columns, BITS: tl.constexpr):
        """Quantise half a row x (HALF,): returns its codes; writes scale and zero."""
        zero = tl.min(x, 0).to(tl.float16).to(tl.float32)
        scale = tl.maximum((tl.max(x, 0) - zero) / (2**BITS - 1), 1e-7).to(tl.float16)
        tl.store(scale_zero, scale)
        tl.store(scale_zero + 1, zero.to(tl.float16))
        code = tl.floor((x - zero) / scale.to(tl.float32) + 0.5)
        return tl.minimum(tl.maximum(code, 0.0), 2**BITS - 1).to(tl.uint8)

    @triton.jit
    def store_kernel(new_k, new_v, codes_k, codes_v, meta_k, meta_v, recent_k, recent_v, positions,
                     stride_kb, stride_kg, stride_vb, stride_vg, S,
                     G: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr):
        """One program stores one row: of K (axis 1 = 0) or V of one key head of one sequence."""
        row = tl.program_id(0).to(tl.int64)  # b G + g
        b, g = row // G, row % G
        slot = tl.load(positions + b) % S
        columns = tl.arange(0, HALF)
        if tl.program_id(1) == 0:
            new, codes, meta, recent = (new_k + b * stride_kb + g * stride_kg,
                                        codes_k, meta_k, recent_k)
        else:
            new, codes, meta, recent = (new_v + b * stride_vb + g * stride_vg,
                                        codes_v, meta_v, recent_v)
        low, high = tl.load(new + columns), tl.load(new + HALF + columns)
        if BITS == 16:
            into = codes + (row * S + slot) * 2 * HALF
            tl.store(into + columns, low)
            tl.store(into + HALF + columns, high)
        else:
            into = recent + (row * R + slot % R) * 2 * HALF
            tl.store(into + columns, low)
            tl.store(into + HALF + columns, high)
            meta += (row * S + slot) * 4
            low_codes = store_half(low.to(tl.float32), codes, meta, columns, BITS)
            high_codes = store_half(high.to(tl.float32), codes, meta + 2, columns, BITS)
            if BITS == 4:
                codes += (row * S + slot) * HALF
                tl.store(codes + columns, low_codes | (high_codes << 4))
            else:
                codes += (row * S + slot) * 2 * HALF
                tl.store(codes + columns, low_codes)
                tl.store(codes + HALF + columns, high_codes)

    @triton.jit
    def load_halves(rows, at, mask, columns, HALF: tl.constexpr, BITS: tl.constexpr,
                    dtype: tl.constexpr):
        """Two (N, HALF) tiles of rows or codes, as the queries' dtype (codes fit exactly)."""
        if BITS == 4:
            packed = tl.load(rows + at[:, None] * HALF + columns[None, :], mask[:, None], 0)
            low, high = packed & 15, packed >> 4
        else:
            at = rows + at[:, None] * (2 * HALF) + columns[None, :]
            low, high = tl.load(at, mask[:, None], 0), tl.load(at + HALF, mask[:, None], 0)
        return low.to(dtype), high.to(dtype)

    @triton.jit
    def attend_kernel(q, rows_k, rows_v, meta_k, meta_v, recent_k, recent_v, positions,
                      partial, top_total, stride_qb, stride_qh, S, W, scale,
                      G: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr,
                      HALF: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr,
                      SPLITS: tl.constexpr, BLOCK: tl.constexpr):
        """One program: the GROUP query heads of one key head over one split of its slots.

        Split number SPLITS, where rows are quantised, is the ring of exact recent rows instead.
        Writes sum p v, (GROUP, D) float32, and the pair (largest score, sum p).
        """
        row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        b, g = row // G, row % G
        dtype: tl.constexpr = q.dtype.element_ty
        position = tl.load(positions + b)
        columns = tl.arange(0, HALF)
        heads = tl.arange(0, PADDED)  # a tensor core tile has at least 16 rows
        head_mask = heads[:, None] < GROUP
        at_q = q + b * stride_qb + (g * GROUP + heads[:, None]) * stride_qh + columns[None, :]
        q_low, q_high = tl.load(at_q, head_mask, 0.0), tl.load(at_q + HALF, head_mask, 0.0)
        sum_low, sum_high = tl.sum(q_low.to(tl.float32), 1), tl.sum(q_high.to(tl.float32), 1)

        out_low = tl.zeros((PADDED, HALF), tl.float32)
        out_high = tl.zeros((PADDED, HALF), tl.float32)
        top = tl.full((PADDED,), -1e30, tl.float32)
        total = tl.zeros((PADDED,), tl.float32)

        if split == SPLITS:
            ring = tl.arange(0, R)
            age = (position % R - ring + R) % R  # % of a negative number is negative here
            mask = age <= position
            k_low, k_high = load_halves(recent_k, row * R + ring, mask, columns, HALF, 16, dtype)
            score = tl.dot(q_low, tl.trans(k_low)) + tl.dot(q_high, tl.trans(k_high))
            score = tl.where(mask[None, :], score * scale, -1e30)
            top = tl.max(score, 1)
            p = tl.exp(score - top[:, None])
            total = tl.sum(p, 1)
            v_low, v_high = load_halves(recent_v, row * R + ring, mask, columns, HALF, 16, dtype)
            out_low, out_high = tl.dot(p.to(dtype), v_low), tl.dot(p.to(dtype), v_high)
        else:
            visible = tl.minimum(position + 1, S)
            share = tl.cdiv(tl.cdiv(visible, SPLITS), BLOCK) * BLOCK
            stop = tl.minimum((split + 1) * share, visible)
            for start in range(split * share, stop, BLOCK):
                slots = start + tl.arange(0, BLOCK)
                age = (position % S) - slots
                age = tl.where(age < 0, age + S, age)
                mask = (slots < stop) & (age < W)
                if BITS != 16:
                    mask = mask & (age >= R)
                at = row * S + slots
                k_low, k_high = load_halves(rows_k, at, mask, columns, HALF, BITS, dtype)
                if BITS == 16:
                    score = tl.dot(q_low, tl.trans(k_low)) + tl.dot(q_high, tl.trans(k_high))
                else:
                    low_scale = tl.load(meta_k + at * 4, mask, 0).to(tl.float32)
                    low_zero = tl.load(meta_k + at * 4 + 1, mask, 0).to(tl.float32)
                    high_scale = tl.load(meta_k + at * 4 + 2, mask, 0).to(tl.float32)
                    high_zero = tl.load(meta_k + at * 4 + 3, mask, 0).to(tl.float32)
                    score = (tl.dot(q_low, tl.trans(k_low)) * low_scale[None, :]
                             + tl.dot(q_high, tl.trans(k_high)) * high_scale[None, :]
                             + sum_low[:, None] * low_zero[None, :]
                             + sum_high[:, None] * high_zero[None, :])
                score = tl.where(mask[None, :], score * scale, -1e30)
                new_top = tl.maximum(top, tl.max(score, 1))
                shrink = tl.exp(top - new_top)
                p = tl.where(mask[None, :], tl.exp(score - new_top[:, None]), 0.0)
                total = total * shrink + tl.sum(p, 1)
                out_low, out_high = out_low * shrink[:, None], out_high * shrink[:, None]
                v_low, v_high = load_halves(rows_v, at, mask, columns, HALF, BITS, dtype)
                if BITS == 16:
                    out_low += tl.dot(p.to(dtype), v_low)
                    out_high += tl.dot(p.to(dtype), v_high)
                else:
                    low_scale = tl.load(meta_v + at * 4, mask, 0).to(tl.float32)
                    low_zero = tl.load(meta_v + at * 4 + 1, mask, 0).to(tl.float32)
                    high_scale = tl.load(meta_v + at * 4 + 2, mask, 0).to(tl.float32)
                    high_zero = tl.load(meta_v + at * 4 + 3, mask, 0).to(tl.float32)
                    out_low += tl.dot((p * low_scale[None, :]).to(dtype), v_low)
                    out_high += tl.dot((p * high_scale[None, :]).to(dtype), v_high)
                    out_low += tl.sum(p * low_zero[None, :], 1)[:, None]
                    out_high += tl.sum(p * high_zero[None, :], 1)[:, None]
                top = new_top

        at = (row * GROUP + heads) * tl.num_programs(1) + split
        tl.store(top_total + at * 2, top, heads < GROUP)
        tl.store(top_total + at * 2 + 1, total, heads < GROUP)
        at = partial + at[:, None] * (2 * HALF) + columns[None, :]
        tl.store(at, out_low, head_mask)
        tl.store(at + HALF, out_high, head_mask)

    @triton.jit
    def merge_kernel(partial, top_total, out, count, COUNT: tl.constexpr, D: tl.constexpr):
        """One program merges the `count` partial results of one query head."""
        head = tl.program_id(0).to(tl.int64)
        splits, columns = tl.arange(0, COUNT), tl.arange(0, D)
        mask = splits < count
        at = head * count + splits
        top = tl.load(top_total + at * 2, mask, -1e30)
        total = tl.load(top_total + at * 2 + 1, mask, 0.0)
        weight = tl.exp(top - tl.max(top, 0))
        parts = tl.load(partial + at[:, None] * D + columns[None, :], mask[:, None], 0.0)
        merged = tl.sum(parts * weight[:, None], 0) / tl.sum(total * weight, 0)
        tl.store(out + head * D + columns, merged.to(out.dtype.element_ty))


def buffers(rows):
    """rows' own tensors as the kernels want them: rows or codes, scale_zero, recent, bits."""
    if hasattr(rows, "data"):
        return rows.data, rows.data, rows.data, 16
    return rows.codes, rows.scale_zero, rows.recent, rows.bits


def store_token(k, v, keys, values, cache):
    """Write k, v (B, G, 1, D) at slot positions[b] % S of every sequence b."""
    B, G, _, D = k.shape
    rows_k, meta_k, recent_k, bits = buffers(keys)
    rows_v, meta_v, recent_v, _ = buffers(values)
    store_kernel[(B * G, 2)](
        k, v, rows_k, rows_v, meta_k, meta_v, recent_k, recent_v, cache.positions,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), rows_k.size(2),
        G, D // 2, bits, recent_k.size(2), num_warps=1,
    )


def attend_token(q, keys, values, cache):
    """q (B, H, 1, D) over every stored token of each sequence -> (B, H, 1, D)."""
    B, H, _, D = q.shape
    rows_k, meta_k, recent_k, bits = buffers(keys)
    rows_v, meta_v, recent_v, _ = buffers(values)
    G, S = rows_k.size(1), rows_k.size(2)
    splits = max(1, min(triton.cdiv(PROGRAMS, B * G), triton.cdiv(S, BLOCK)))
    count = splits + (bits != 16)
    partial = torch.empty(B * H, count, D, dtype=torch.float32, device=q.device)
    top_total = torch.empty(B * H, count, 2, dtype=torch.float32, device=q.device)
    out = torch.empty(B, H, 1, D, dtype=q.dtype, device=q.device)
    attend_kernel[(B * G, count)](
        q, rows_k, rows_v, meta_k, meta_v, recent_k, recent_v, cache.positions,
        partial, top_total, q.stride(0), q.stride(1), S, cache.max_length, D**-0.5,
        G, H // G, max(16, triton.next_power_of_2(H // G)), D // 2, bits, recent_k.size(2),
        splits, BLOCK, num_warps=4,
    )
    merge_kernel[(B * H,)](partial, top_total, out, count, triton.next_power_of_2(count), D)
    return out
