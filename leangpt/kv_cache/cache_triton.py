"""Decoding kernel for CUDA, in Triton: store one token's K and V, and attend from it.

Every index comes from the device tensor `positions`, so one captured CUDA graph serves every
context length, and quantised rows are read as they are (rows_triton.py), for each half of a head

    q . k = scale (q . codes) + zero sum(q)        p . v = (p scale) . codes + sum(p zero).

The stored context is split over many programs; one more takes what is new: it stores the token's
rows, and attends to them and to the exact ring of recent ones. The last of a head's programs to
finish merges their results by logsumexp ("Flash-Decoding", Dao, Haziza, Massa, Sizov 2023).
Where `supports` says no, cache.py does the same in plain PyTorch. TRITON_INTERPRET=1 runs the
kernel on a CPU, slowly, for tests.
"""

import torch

from leangpt.system.triton import AVAILABLE, INTERPRETED, tl, triton

if triton is not None:
    from leangpt.kv_cache.rows_triton import load_halves, load_meta, store_row, turn

LEAST = 128  # slots at least in a split, so that its fixed costs do not show ...
SHORT = 64  # ... but where there would be fewer than 132 programs
LOG2_E = 1.4426950408889634  # the kernel's exponentials are powers of two
# by bits a number: slots a program looks at in one go, its warps, loads in flight, programs aimed
# at; the fastest on an H100 at 131,072 slots
LAUNCH = {16: (64, 2, 3, 528), 8: (32, 1, 3, 2112), 4: (64, 1, 3, 2112)}


def supports(device, width, dtype):
    """Whether rows of `width` numbers and queries of `dtype` on a device suit the kernel."""
    half = width // 2
    here = AVAILABLE and (device.type == "cuda" or INTERPRETED)
    return (
        here
        and dtype in (torch.bfloat16, torch.float16)
        and 16 <= half <= 64
        and half & (half - 1) == 0
    )


if triton is not None:

    @triton.jit
    def attend_kernel(
        q,
        new_k,
        new_v,
        cos,
        sin,
        rows_k,
        rows_v,
        meta_k,
        meta_v,
        words_k,
        words_v,
        recent_k,
        recent_v,
        positions,
        partial,
        top_total,
        arrived,
        out,
        stride_qb,
        stride_qh,
        stride_kb,
        stride_kg,
        stride_vb,
        stride_vg,
        S,
        W,
        scale,
        G: tl.constexpr,
        GROUP: tl.constexpr,
        PADDED: tl.constexpr,
        HALF: tl.constexpr,
        BITS: tl.constexpr,
        R: tl.constexpr,
        ROPE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program: the GROUP query heads of one key head over one split of its slots.

        Scores are (slots, heads) and sums of values (HALF, heads): the few query heads are the
        short side of the tensor cores' tiles. S slots a sequence, W of them seen at most.
        scale: of the scores, for powers of two.
        """
        row, split, count = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        b, g = row // G, row % G
        dtype: tl.constexpr = q.dtype.element_ty
        bias: tl.constexpr = 0 if BITS != 4 else (128 if dtype == tl.bfloat16 else 1024)
        position = tl.load(positions + b)
        columns = tl.arange(0, HALF)
        heads = tl.arange(0, PADDED)  # a tensor core's tile is at least 8 wide
        is_head = heads[None, :] < GROUP
        at_q = q + b * stride_qb + (g * GROUP + heads[None, :]) * stride_qh + columns[:, None]
        q_low, q_high = tl.load(at_q, is_head, 0.0), tl.load(at_q + HALF, is_head, 0.0)
        if ROPE:
            turn_cos = tl.load(cos + b * HALF + columns)
            turn_sin = tl.load(sin + b * HALF + columns)
            q_low, q_high = turn(q_low, q_high, turn_cos[:, None], turn_sin[:, None])

        if split == count - 1:
            at_k = new_k + b * stride_kb + g * stride_kg + columns
            at_v = new_v + b * stride_vb + g * stride_vg + columns
            k_low, k_high = tl.load(at_k), tl.load(at_k + HALF)
            v_low, v_high = tl.load(at_v), tl.load(at_v + HALF)
            if ROPE:
                k_low, k_high = turn(k_low, k_high, turn_cos, turn_sin)
            store_row(
                k_low,
                k_high,
                rows_k,
                meta_k,
                recent_k,
                row,
                position % S,
                S,
                columns,
                HALF,
                BITS,
                R,
            )
            store_row(
                v_low,
                v_high,
                rows_v,
                meta_v,
                recent_v,
                row,
                position % S,
                S,
                columns,
                HALF,
                BITS,
                R,
            )
            top = tl.sum(
                q_low.to(tl.float32) * k_low.to(tl.float32)[:, None]
                + q_high.to(tl.float32) * k_high.to(tl.float32)[:, None],
                0,
            )
            total = tl.full((PADDED,), 1.0, tl.float32)
            out_low = tl.zeros((HALF, PADDED), tl.float32) + v_low.to(tl.float32)[:, None]
            out_high = tl.zeros((HALF, PADDED), tl.float32) + v_high.to(tl.float32)[:, None]
            if BITS != 16:  # the ring, R rows of it, but for the new one's place
                ring = tl.arange(0, R)
                age = (position % R - ring + R) % R  # % of a negative number is negative here
                mask = (age > 0) & (age <= position) & (age < W)
                k_low, k_high = load_halves(
                    recent_k,
                    (row * R + ring)[:, None],
                    mask[:, None],
                    columns[None, :],
                    HALF,
                    16,
                    dtype,
                )
                score = tl.dot(k_low, q_low) + tl.dot(k_high, q_high)
                score = tl.where(mask[:, None], score, float("-inf"))
                new_top = tl.maximum(top, tl.max(score, 0))
                shrink = tl.exp2((top - new_top) * scale)
                p = tl.exp2(score * scale - (new_top * scale)[None, :])
                v_low, v_high = load_halves(
                    recent_v,
                    (row * R + ring)[None, :],
                    mask[None, :],
                    columns[:, None],
                    HALF,
                    16,
                    dtype,
                )
                out_low = out_low * shrink[None, :] + tl.dot(v_low, p.to(dtype))
                out_high = out_high * shrink[None, :] + tl.dot(v_high, p.to(dtype))
                total = total * shrink + tl.sum(p, 0)
                top = new_top
        else:
            sum_low, sum_high = tl.sum(q_low.to(tl.float32), 0), tl.sum(q_high.to(tl.float32), 0)
            top = tl.full((PADDED,), -1e30, tl.float32)
            total = tl.zeros((PADDED,), tl.float32)
            fix_low = tl.zeros((PADDED,), tl.float32)
            fix_high = tl.zeros((PADDED,), tl.float32)
            out_low = tl.zeros((HALF, PADDED), tl.float32)
            out_high = tl.zeros((HALF, PADDED), tl.float32)
            newest = (position % S).to(tl.int32)
            visible = tl.minimum(position + 1, S).to(tl.int32)
            share = tl.cdiv(tl.cdiv(visible, count - 1), BLOCK) * BLOCK
            stop = tl.minimum((split + 1) * share, visible)
            for start in range(split * share, stop, BLOCK):
                slots = start + tl.arange(0, BLOCK)
                age = newest - slots
                age = tl.where(age < 0, age + S, age)
                # the new row, and the exact ring's, are the other program's
                mask = (slots < stop) & (age < W) & (age >= (1 if BITS == 16 else R))
                at = row * S + slots
                k_low, k_high = load_halves(
                    rows_k, at[:, None], mask[:, None], columns[None, :], HALF, BITS, dtype
                )
                if BITS == 16:
                    score = tl.dot(k_high, q_high, tl.dot(k_low, q_low))
                else:
                    low_scale, low_zero, high_scale, high_zero = load_meta(words_k, at, mask)
                    score = (
                        tl.dot(k_low, q_low) * low_scale[:, None]
                        + tl.dot(k_high, q_high) * high_scale[:, None]
                        + (low_zero - bias * low_scale)[:, None] * sum_low[None, :]
                        + (high_zero - bias * high_scale)[:, None] * sum_high[None, :]
                    )
                score = tl.where(mask[:, None], score, float("-inf"))
                new_top = tl.maximum(top, tl.max(score, 0))
                shrink = tl.exp2((top - new_top) * scale)
                p = tl.exp2(score * scale - (new_top * scale)[None, :])
                total = total * shrink + tl.sum(p, 0)
                out_low, out_high = out_low * shrink[None, :], out_high * shrink[None, :]
                v_low, v_high = load_halves(
                    rows_v, at[None, :], mask[None, :], columns[:, None], HALF, BITS, dtype
                )
                if BITS == 16:
                    out_low = tl.dot(v_low, p.to(dtype), out_low)
                    out_high = tl.dot(v_high, p.to(dtype), out_high)
                else:
                    low_scale, low_zero, high_scale, high_zero = load_meta(words_v, at, mask)
                    p_low = (p * low_scale[:, None]).to(dtype)
                    p_high = (p * high_scale[:, None]).to(dtype)
                    out_low = tl.dot(v_low, p_low, out_low)
                    out_high = tl.dot(v_high, p_high, out_high)
                    fix_low = fix_low * shrink + tl.sum(
                        p * low_zero[:, None] - bias * p_low.to(tl.float32), 0
                    )
                    fix_high = fix_high * shrink + tl.sum(
                        p * high_zero[:, None] - bias * p_high.to(tl.float32), 0
                    )
                top = new_top
            out_low, out_high = out_low + fix_low[None, :], out_high + fix_high[None, :]

        at = (row * GROUP + heads) * count + split
        tl.store(top_total + at * 2, top * scale, heads < GROUP)
        tl.store(top_total + at * 2 + 1, total, heads < GROUP)
        at = partial + at[None, :] * (2 * HALF) + columns[:, None]
        tl.store(at, out_low, is_head)
        tl.store(at + HALF, out_high, is_head)
        tl.debug_barrier()  # all threads' results before this program counts as arrived
        if tl.atomic_add(arrived + row, 1, sem="acq_rel") == count - 1:
            tl.store(arrived + row, 0)  # for the next step
            for head in range(GROUP):
                merge(partial, top_total, out, row * GROUP + head, count, 2 * HALF)

    @triton.jit
    def merge(partial, top_total, out, head, count, D: tl.constexpr):
        """Merge the `count` partial results of one query head."""
        CHUNK: tl.constexpr = 32
        columns = tl.arange(0, D)
        merged = tl.zeros((D,), tl.float32)
        top, total = -1e30, 0.0
        for first in range(0, count, CHUNK):
            splits = first + tl.arange(0, CHUNK)
            mask = splits < count
            at = head * count + splits
            # .cg: not from the processor's own cache, which does not see the others' results
            tops = tl.load(top_total + at * 2, mask, -1e30, cache_modifier=".cg")
            totals = tl.load(top_total + at * 2 + 1, mask, 0.0, cache_modifier=".cg")
            parts = tl.load(
                partial + at[:, None] * D + columns[None, :],
                mask[:, None],
                0.0,
                cache_modifier=".cg",
            )
            new_top = tl.maximum(top, tl.max(tops, 0))
            shrink, weight = tl.exp2(top - new_top), tl.exp2(tops - new_top)
            merged = merged * shrink + tl.sum(parts * weight[:, None], 0)
            total = total * shrink + tl.sum(totals * weight, 0)
            top = new_top
        tl.store(out + head * D + columns, (merged / total).to(out.dtype.element_ty))


def split_count(rows, slots, programs):
    """How many of `programs` share the `slots` of each of `rows` key heads of sequences."""
    wanted = triton.cdiv(programs, rows)
    least = LEAST if rows * triton.cdiv(slots, LEAST) >= 132 else SHORT
    return max(1, min(wanted, triton.cdiv(slots, least)))


class TokenKernel:
    """A cache's kernel: stores one token a sequence and attends from it.

    rows: key/value heads of all sequences, B G. It counts for itself which of a head's programs
    have arrived, in a buffer that is zeros between calls.
    """

    def __init__(self, rows, device):
        self.arrived = torch.zeros(rows, dtype=torch.int32, device=device)

    def __call__(self, q, k, v, keys, values, cache, turn=None):
        """q (B, H, 1, D), k, v (B, G, 1, D) -> (B, H, 1, D).

        keys, values: a layer's stored rows (rows.py). turn: cos and sin (B, D/2) float32 of the
        rope that q and k still want, or None.
        """
        B, H, _, D = q.shape
        G = k.size(1)
        rows_k, meta_k, recent_k, bits = keys.kernel_buffers()
        rows_v, meta_v, recent_v, _ = values.kernel_buffers()
        words_k, words_v = cache.positions, cache.positions  # int64, not read
        if bits != 16:
            words_k, words_v = meta_k.view(torch.int64), meta_v.view(torch.int64)
        cos, sin = (q, q) if turn is None else turn  # not read
        S, group = rows_k.size(2), H // G
        block, warps, stages, programs = LAUNCH[bits]
        count = split_count(B * G, S, programs) + 1
        partial = torch.empty(B * H, count, D, dtype=torch.float32, device=q.device)
        top_total = torch.empty(B * H, count, 2, dtype=torch.float32, device=q.device)
        out = torch.empty(B, H, 1, D, dtype=q.dtype, device=q.device)
        attend_kernel[(B * G, count)](
            q,
            k,
            v,
            cos,
            sin,
            rows_k,
            rows_v,
            meta_k,
            meta_v,
            words_k,
            words_v,
            recent_k,
            recent_v,
            cache.positions,
            partial,
            top_total,
            self.arrived,
            out,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            S,
            cache.max_length,
            D**-0.5 * LOG2_E,
            G,
            group,
            max(8, triton.next_power_of_2(group)),
            D // 2,
            bits,
            1 if bits == 16 else recent_k.size(2),
            turn is not None,
            block,
            num_warps=warps,
            num_stages=stages,
        )
        return out
