"""The backward of a block by tiles: gradients of x and the weights from x, lse and attention's out.

Two phases for each slice of the batch, and three buffers as long as the sequence besides what
the caller holds: the gradient of x, the gradient of attention's output, and dq of a few heads.

1. After attention (projection, residuals, MLP), rows independent. What arrives at x by the
   residual goes to grad_x. What arrives at attention's output goes where that output was: all
   that attention's backward wants of `out` is its product with its gradient, row by row and head
   by head, and the multiple (grad.out / grad.grad) of the gradient has the same product.
2. Attention, a few heads at a time where that is no slower (tile_sizes.heads_at_once). Key/value
   tiles are taken first to last, each against its own rows (the causal diagonal) and all rows
   below. Then dk and dv of the tile are complete, and so is dq of its rows: every key they see has
   been visited. Only dq is kept for all rows, of those heads, and their queries where those are
   not recomputed.

The other order, query tiles outside, keeps dk and dv of all rows and recomputes two matrices for
a pair of tiles, not one.
"""

from functools import partial

import torch

from leangpt.attention.kv_source import StoredRows, key_tiles, row_positions
from leangpt.attention.tile_kernels import tile_backward


class ParameterGradients:
    """Sums of parameter gradients over tiles, in float32 or wider."""

    def __init__(self, parameters, needed):
        self.parameters = [p for p, need in zip(parameters, needed) if need]
        self.sums = {}

    def backward(self, outputs, inputs, grads):
        """Gradients of `outputs` for `inputs`; those for the parameters are added up here."""
        found = torch.autograd.grad(outputs, [*inputs, *self.parameters], grads, allow_unused=True)
        for parameter, grad in zip(self.parameters, found[len(inputs) :]):
            if grad is None:
                continue
            if parameter in self.sums:
                self.sums[parameter] += grad
            else:
                self.sums[parameter] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return found[: len(inputs)]

    def total(self, parameter):
        """The sum for one parameter, in its dtype, or None; it is let go of here."""
        found = self.sums.pop(parameter, None)
        return None if found is None else found.to(parameter.dtype)


def backward_whole(tiles, x, grad, weights):
    """Gradient of x (B, T, C) where a tile holds whole sequences: the plain block once more."""
    grad_x = torch.empty_like(x)
    for batch in tiles.batches():
        xb = x[batch].detach().requires_grad_()
        with torch.enable_grad():
            y = tiles.plain(xb, batch.start)
        (grad_x[batch],) = weights.backward([y], [xb], [grad[batch].to(y.dtype)])
        del xb, y  # before the next sequences' are made
    return grad_x


def backward_tiles(tiles, x, lse, out, out_dtype, grad, weights):
    """Gradient of x (B, T, C); the parameters' are added up in `weights` (ParameterGradients).

    lse (B, H, T) and out (B, T, C) are attention's, of the forward pass; grad (B, T, C) is the
    output's gradient. `out` is overwritten; where it is None, attention is recomputed.
    """
    grad_x = torch.empty_like(x)
    width = tiles.config.n_head * tiles.config.head_dim
    for batch in tiles.batches():
        xb = x[batch]
        spent = xb.new_empty(*xb.shape[:2], width, dtype=out_dtype) if out is None else out[batch]
        multiple = torch.empty_like(lse[batch])
        after_attention(
            tiles,
            xb,
            out is None,
            spent,
            multiple,
            grad[batch],
            grad_x[batch],
            weights,
            batch.start,
        )
        for heads in tiles.head_slices():
            attention_backward(
                tiles, xb, lse[batch], spent, multiple, grad_x[batch], weights, heads
            )
    return grad_x


def after_attention(tiles, x, recompute, out, multiple, grad, grad_x, weights, batch_start):
    """Phase 1: out becomes its own gradient, multiple (b, H, T) what it must be multiplied by."""
    source = tiles.source(x) if recompute else None
    for group in tiles.groups():
        if recompute:
            for (start, stop), (tile_out, _) in zip(group, tiles.attend(x, source, group)):
                out[:, start:stop] = tile_out.transpose(1, 2).flatten(2)
            del tile_out
        for a, b in (part for run in group for part in tiles.mlp_tiles(*run, len(x))):
            xm = x[:, a:b].detach().requires_grad_()
            om = tiles.by_head(out[:, a:b]).detach().requires_grad_()
            with torch.enable_grad():
                ym = tiles.finish(xm, om, a, batch_start)
            grad_x[:, a:b], found = weights.backward([ym], [xm, om], [grad[:, a:b].to(ym.dtype)])
            del xm, ym
            multiple[:, :, a:b] = same_product(found, om.detach())
            tiles.by_head(out[:, a:b]).copy_(found)
            del om, found


def same_product(grad, out):
    """m (B, H, t) such that the rows of m grad have the products with grad that those of out have.

    Scaled by the largest number of a row, so that no square of a small gradient underflows.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad = grad.to(wide)
    largest = grad.abs().amax(-1, keepdim=True)  # (B, H, t, 1)
    largest.clamp_min_(torch.finfo(wide).tiny)
    grad = grad / largest
    product = (grad * out).sum(-1, keepdim=True)
    return (product / grad.square().sum(-1, keepdim=True).clamp_min_(0.5) / largest)[..., 0]


def attention_backward(tiles, x, lse, grad_out, multiple, grad_x, weights, heads):
    """Phase 2 for key/value heads [first, stop), or all, and their queries: adds to grad_x."""
    config = tiles.config
    g = config.n_head // config.kv_heads
    mine = slice(*(n * g for n in heads or (0, config.kv_heads)))  # their queries' heads
    grad_out = tiles.by_head(grad_out)[:, mine]  # (b, h, T, D)
    lse, multiple = lse[:, mine], multiple[:, mine]
    wide = torch.promote_types(x.dtype, torch.float32)
    b, h, T, D = grad_out.shape
    # queries of a few heads are few numbers: kept, whatever the policy
    query_source = StoredRows if heads else config.source
    queries = query_source(partial(tiles.project, parts="q", heads=heads), x, tiles.k_chunk)
    dq = torch.zeros(b, T, h, D, dtype=wide, device=x.device).transpose(1, 2)

    def pair_backward(start, stop, q, k, v, causal):
        """(dk, dv) of a key/value tile from query rows [start, stop), whose dq is added up."""
        rows = slice(start, stop)
        grad = grad_out[:, :, rows]
        factor = multiple[:, :, rows, None]
        if grad.dtype != torch.float16:  # in whose range a small gradient's would be infinite
            factor = factor.to(grad.dtype)
        out = (grad * factor).to(grad.dtype)
        dq_tile, dk, dv = tile_backward(
            grad, q, k, v, out, lse[:, :, rows].contiguous(), causal, tiles.fixed_shapes
        )
        dq[:, :, rows] += dq_tile
        return dk, dv

    others = None  # what the queries of other processes add to dk and dv
    if tiles.pieces is not None:
        source = config.source(partial(tiles.project, parts="kv", heads=heads), x, tiles.k_chunk)
        like = grad_out.new_empty(2, b, h // g, 0, D)
        others = tiles.pieces.ring.backward(pair_backward, queries, source, like, tiles.piece)
        del source

    for start, stop in reversed(tiles.row_tiles()):
        xt = x[:, start:stop].detach().requires_grad_()
        with torch.enable_grad():
            projected = tiles.project(xt, row_positions(start, stop, x.device), "qkv", heads)
        q, k, v = (part.detach() for part in projected)
        dk, dv = (part.to(wide) for part in pair_backward(start, stop, q, k, v, True))
        for below in key_tiles(stop, T, tiles.k_chunk):
            for total, part in zip(
                (dk, dv), pair_backward(*below, *queries.rows(*below), k, v, False)
            ):
                total += part
            del part  # before the next tile's are made

        if others is not None:
            for total, part in zip((dk, dv), others):
                total += part[:, :, start:stop]

        # before attention: dk, dv and the rows' dq are complete now
        grads = [part.to(q.dtype) for part in (dq[:, :, start:stop], dk, dv)]
        grad_x[:, start:stop] += weights.backward(projected, [xt], grads)[0]
        del q, k, v, dk, dv, xt, projected, grads
