"""One pass over a chunk of logits on the GPU: the loss of each row, its gradient in place.

Plain PyTorch would read and write the (rows, V) logits about eight times, in float32. Here each
row is read once, held by 32 warps in registers as it came (16 bits a logit), and written once.
Rows too long for that, or of float32, are read twice: the running maximum and sum of the online
softmax (Milakov & Gimelshein 2018, arXiv 1805.02867), then the gradient. Few rows are under way
at once, so the second read finds most of them in the L2 cache.
"""

import torch

from leangpt.system.triton import tl, triton

EACH = 4  # neighbouring logits a lane takes at once
LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are powers of two here
LN_2 = tl.constexpr(0.6931471805599453)
MOST_IN_REGISTERS = 65536  # logits a row, 16 bits each: half of a processor's registers


@triton.jit
def _row_kernel(
    logits, stride, targets, losses, count, V, IGNORE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    scale = tl.where(target == IGNORE, 0.0, 1.0) / tl.load(count).to(tl.float32)  # 0/0: NaN

    highest = tl.full((BLOCK,), float("-inf"), tl.float32)  # running maximum and sum, by lane
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf")).to(
            tl.float32
        )
        higher = tl.maximum(highest, x)
        kept = tl.where(highest == float("-inf"), 0.0, tl.exp(highest - higher))
        new = tl.where(x == float("-inf"), 0.0, tl.exp(x - higher))
        total = total * kept + new
        highest = higher
    peak = tl.max(highest, 0)
    lse = peak + tl.log(tl.sum(tl.where(total > 0.0, total * tl.exp(highest - peak), 0.0), 0))

    picked = tl.load(logits + tl.where(target == IGNORE, 0, target)).to(tl.float32)
    tl.store(losses + row, (lse - picked) * scale)
    tl.debug_barrier()  # every lane has read `picked` before any overwrites it
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(x - lse) - tl.where(start + columns == target, 1.0, 0.0)
        tl.store(logits + start + columns, gradient * scale, mask=inside)


@triton.jit
def _whole_row_kernel(
    logits,
    stride,
    targets,
    losses,
    count,
    V: tl.constexpr,
    IGNORE: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
    TILES: tl.constexpr,
):
    """As _row_kernel, the row read once and kept in registers as it came, TILES pieces."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    scale = tl.where(target == IGNORE, 0.0, 1.0) / tl.load(count).to(tl.float32)  # 0/0: NaN
    at_target = logits + tl.where(target == IGNORE, 0, target)
    picked = tl.load(at_target).to(tl.float32)
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]

    tiles = ()
    for i in tl.static_range(TILES):
        at = i * LANES * EACH + columns
        if (i + 1) * LANES * EACH <= V:
            tiles += (tl.load(logits + at),)
        else:
            tiles += (tl.load(logits + at, mask=at < V, other=float("-inf")),)
    highest = tiles[0]
    for i in tl.static_range(1, TILES):
        highest = tl.maximum(highest, tiles[i])
    peak = tl.max(tl.max(highest, 1), 0).to(tl.float32) * LOG2_E
    total = tl.zeros((LANES, EACH), tl.float32)
    for i in tl.static_range(TILES):
        total += tl.exp2(tiles[i].to(tl.float32) * LOG2_E - peak)
    lse = peak + tl.log2(tl.sum(tl.sum(total, 1), 0))
    picked = picked * LOG2_E - lse
    tl.store(losses + row, picked * -LN_2 * scale)

    tl.debug_barrier()  # every lane has read `picked` before any overwrites it
    shift = tl.log2(scale) - lse
    for i in tl.static_range(TILES):
        at = i * LANES * EACH + columns
        gradient = tl.exp2(tiles[i].to(tl.float32) * LOG2_E + shift)
        if (i + 1) * LANES * EACH <= V:
            tl.store(logits + at, gradient)
        else:
            tl.store(logits + at, gradient, mask=at < V)
    tl.debug_barrier()  # softmax is there: now the one place where the target is subtracted
    tl.store(at_target, (tl.exp2(picked) - 1.0) * scale)


def loss_and_grad(logits, targets, count, ignore):
    """logits (rows, V) on CUDA, row-contiguous; targets (rows,) int64; count: () int64 tensor.

    Returns the rows' share of the mean loss, () float32, and dloss/dlogits, written over logits.
    """
    rows, V = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if logits.element_size() == 2 and 8192 < V <= MOST_IN_REGISTERS and V % EACH == 0:
        _whole_row_kernel[(rows,)](
            logits,
            logits.stride(0),
            targets,
            losses,
            count,
            V,
            ignore,
            LANES=1024,
            EACH=EACH,
            TILES=triton.cdiv(V, 1024 * EACH),
            num_warps=32,
        )
    else:
        _row_kernel[(rows,)](
            logits,
            logits.stride(0),
            targets,
            losses,
            count,
            V,
            ignore,
            BLOCK=8192 if V > 8192 else 1024,
            num_warps=32 if V > 8192 else 8,
        )
    return losses.sum(), logits
