"""Where keys and values come from while a block runs, and attention over them.

A *KV source* hands out (k, v) for rows [start, stop) of a sequence. There are two: `StoredRows`
keeps those of all rows, `RecomputedRows` keeps none and projects x again whenever it is asked.
`attend_rows` runs a tile of queries over a source: the causal diagonal first, then what lies to
its left, merged by logsumexp. Nothing above the diagonal is ever computed.

A new source needs `recomputes`, `rows` and `k_chunk`, as below, and a policy that names it
(attention_policies.py).
"""

from functools import partial

import torch
from torch.nn import functional as F

from leangpt.attention.tile_kernels import merge_, tile_forward

MERGED_QUERIES = 1024  # whose attention over one tile of keys the CPU merges at a time


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Causal attention over whole sequences in one fused kernel.

    q (B, H, T, D); k, v (B, G, T, D) with G dividing H; dropout: a probability, of attention's
    weights. -> (B, H, T, D) in q's dtype.
    """
    if q.is_cuda and q.dtype == torch.float32 and q.size(1) != k.size(1):
        # the one fused kernel for float32 does not share heads: T x T scores would be stored
        k, v = (part.repeat_interleave(q.size(1) // k.size(1), dim=1) for part in (k, v))
    causal = partial(
        F.scaled_dot_product_attention,
        dropout_p=dropout,
        is_causal=True,
        enable_gqa=q.size(1) != k.size(1),
    )
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        with torch.autocast("cpu", enabled=False):
            return causal(q.float(), k.float(), v.float()).to(q.dtype)
    return causal(q, k, v)


class RecomputedRows:
    """Nothing is kept: rows of x (B, T, C) are projected when asked for.

    project(rows of x (B, t, C), their positions (t,)) -> (k, v) of them, (B, G, t, D) each; or, in
    backward, (q,) alone. k_chunk: rows to ask for at once, at most.
    """

    recomputes = True

    def __init__(self, project, x, k_chunk):
        self.project, self.x, self.k_chunk = project, x, k_chunk

    def rows(self, start, stop):
        return self.project(self.x[:, start:stop], row_positions(start, stop, self.x.device))


class StoredRows:
    """The same of all rows, in buffers (B, G, T, D).

    They are filled chunk by chunk, so that the projection's own temporaries stay small.
    """

    recomputes = False

    def __init__(self, project, x, k_chunk):
        self.k_chunk = k_chunk
        for start, stop in key_tiles(0, x.size(1), k_chunk):
            parts = project(x[:, start:stop], row_positions(start, stop, x.device))
            if start == 0:
                self.parts = [_buffer(part, x.size(1)) for part in parts]
            for whole, part in zip(self.parts, parts):
                whole[:, :, start:stop] = part
            del parts, part  # before the next chunk's are made

    def rows(self, start, stop):
        return tuple(whole[:, :, start:stop] for whole in self.parts)


def _buffer(like, T):
    """Uninitialised (B, G, T, D): on CUDA with heads inside rows, as projections have them."""
    B, G, _, D = like.shape
    if like.device.type == "cpu":
        return like.new_empty(B, G, T, D)
    return like.new_empty(B, T, G, D).transpose(1, 2)


def row_positions(start, stop, device):
    """Positions of rows [start, stop) of a sequence, (stop - start,) int64."""
    return torch.arange(start, stop, device=device)


def key_tiles(start, stop, k_chunk):
    """Row ranges that cover [start, stop), k_chunk rows each, the last one ragged if need be."""
    return [(a, min(a + k_chunk, stop)) for a in range(start, stop, k_chunk)]


def head_rows(source, start, stop):
    """k, v (B, G, t, D) of a source; on the CPU a head's rows lie one after the other, as its fused
    kernel reads them 5% faster than with the other heads between."""
    k, v = source.rows(start, stop)
    if k.device.type != "cpu" or k.stride(2) == k.size(3):
        return k, v
    return k.contiguous(), v.contiguous()


def attend_rows(q, source, start, stop, fixed_shapes):
    """Causal attention of rows [start, stop) over all rows up to each: q (B, H, t, D).

    Returns out (B, H, t, D) in q's dtype, and lse (B, H, t) float32 or wider. At most k_chunk rows
    of K and V are asked for at once, on the diagonal too.
    """
    diagonal = key_tiles(start, stop, source.k_chunk)
    if len(diagonal) == 1:
        out, lse = tile_forward(q, *head_rows(source, start, stop), True, fixed_shapes)
        if start == 0:
            return out, lse
        merged = out.to(torch.promote_types(out.dtype, torch.float32))
        lse = lse.clone(memory_format=torch.contiguous_format)
        del out
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        merged = torch.zeros_like(q, dtype=wide)  # nothing seen yet: a weight of exp(-inf)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
        for a, b in diagonal:
            k, v = head_rows(source, a, b)
            here, below = slice(a - start, b - start), slice(b - start, None)
            merge_(
                merged[:, :, here],
                lse[:, :, here],
                *tile_forward(q[:, :, here], k, v, True, fixed_shapes),
            )
            if b < stop:
                merge_keys_(
                    merged[:, :, below], lse[:, :, below], q[:, :, below], k, v, fixed_shapes
                )
            del k, v
    for a, b in key_tiles(0, start, source.k_chunk):
        merge_keys_(merged, lse, q, *head_rows(source, a, b), fixed_shapes)
    return merged.to(q.dtype), lse


def merge_keys_(merged, lse, q, k, v, fixed_shapes):
    """Merge attention of q (B, H, t, D) over keys that all its rows may see into (merged, lse).

    On the CPU MERGED_QUERIES of them at a time (more where there are many threads), so that what
    waits to be merged is never as long as a tile: larger tiles then fit the same memory.
    """
    B, H, t, _ = q.shape
    step = t
    if q.device.type == "cpu":
        step = max(MERGED_QUERIES, -(-MERGED_QUERIES * torch.get_num_threads() // (B * H)))
    for a in range(0, t, step):
        part = slice(a, a + step)
        merge_(
            merged[:, :, part],
            lse[:, :, part],
            *tile_forward(q[:, :, part], k, v, False, fixed_shapes),
        )
