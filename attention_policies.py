"""Where keys and values live while a block runs: the attention policies.

  cache      K and V of all T rows, H heads, computed once and kept while the block runs
  grouped    the same with G < H heads (grouped-query attention, arXiv 2305.13245)
  recompute  K and V of k_chunk rows at a time, computed from x when needed, dropped at once

Every policy has the same parameters and gives the same numbers. A policy is a *KV source*: it
hands out (k, v) for rows [start, stop). `attend_rows` runs a tile of queries over a source:
the causal diagonal tile, then what lies to its left, merged by logsumexp. Nothing above the
diagonal is ever computed.

For KV caches while decoding, see leangpt/attention/kv_cache.py.
"""

from functools import partial

import torch
from torch.nn import functional as F

from leangpt.attention.tile_kernels import merge_, tile_forward

POLICIES = {
    "cache": "K and V of all rows kept while a block runs",
    "grouped": "the same with n_kv_head < n_head key/value heads",
    "recompute": "K and V recomputed from x, k_chunk rows at a time",
}
ROWS = 1024  # of queries whose attention over one tile of keys the CPU merges at a time


def attend(q, k, v, dropout=0.0):
    """Causal attention over whole sequences, one fused kernel: (B, H, T, D) -> (B, H, T, D)."""
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
    """`recompute`: nothing is kept; rows of x (B, T, C) are projected when asked for.

    project(x, start) -> (k, v) of those rows, (B, G, t, D) each; or, in backward, (q,).
    """

    def __init__(self, project, x, k_chunk):
        self.project, self.x, self.k_chunk = project, x, k_chunk

    def rows(self, start, stop):
        return self.project(self.x[:, start:stop], start)


class StoredRows(RecomputedRows):
    """`cache` and `grouped`: the same of all rows, in buffers (B, G, T, D).

    They are filled chunk by chunk, so that the projection's own temporaries stay small.
    """

    def __init__(self, project, x, k_chunk):
        super().__init__(project, x, k_chunk)
        for start in range(0, x.size(1), k_chunk):
            parts = project(x[:, start : start + k_chunk], start)
            if start == 0:
                self.parts = [self._buffer(part, x.size(1)) for part in parts]
            for whole, part in zip(self.parts, parts):
                whole[:, :, start : start + k_chunk] = part
            del parts, part  # before the next chunk's are made

    def rows(self, start, stop):
        return tuple(whole[:, :, start:stop] for whole in self.parts)

    @staticmethod
    def _buffer(like, T):
        """Uninitialised (B, G, T, D): on CUDA with heads inside rows, as projections have them."""
        B, G, _, D = like.shape
        if like.device.type == "cpu":
            return like.new_empty(B, G, T, D)
        return like.new_empty(B, T, G, D).transpose(1, 2)


def row_source(policy, project, x, k_chunk):
    """The source of a policy over x (B, T, C): of keys and values, or of queries in backward."""
    return (RecomputedRows if policy == "recompute" else StoredRows)(project, x, k_chunk)


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

    Returns out (B, H, t, D) in q's dtype, and lse (B, H, t). No more than k_chunk rows of K and
    V are asked for at once, on the diagonal neither.
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

    On the CPU ROWS of them at a time (more where there are many threads), so that what waits to be
    merged is never as long as a tile: larger tiles then fit the same memory.
    """
    B, H, t, _ = q.shape
    step = t
    if q.device.type == "cpu":
        step = max(ROWS, -(-ROWS * torch.get_num_threads() // (B * H)))
    for a in range(0, t, step):
        part = slice(a, a + step)
        merge_(
            merged[:, :, part],
            lse[:, :, part],
            *tile_forward(q[:, :, part], k, v, False, fixed_shapes),
        )
