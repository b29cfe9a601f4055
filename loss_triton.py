"""One pass over a chunk of logits on the GPU: the loss of each row, its gradient in place.

Plain PyTorch would read and write the (rows, V) logits about eight times, in float32. Here each
row is read twice (the running maximum and sum of the online softmax, Milakov & Gimelshein 2018,
arXiv 1805.02867, then the gradient) and written once. A program takes a row with 32 warps, so
few rows are under way at once and the second read finds them in the L2 cache.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _row_kernel(logits, stride, targets, losses, count, V, IGNORE: tl.constexpr,
                BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    scale = tl.where(target == IGNORE, 0.0, 1.0 / tl.load(count).to(tl.float32))

    highest = tl.full((BLOCK,), float("-inf"), tl.float32)  # running maximum and sum, by lane
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < V,
                    other=float("-inf")).to(tl.float32)
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


def loss_and_grad(logits, targets, count, ignore):
    """logits (rows, V) on CUDA, row-contiguous; targets (rows,) int64; count: () int64 tensor.

    Returns the rows' share of the mean loss, () float32, and dloss/dlogits, written over logits.
    """
    rows, V = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _row_kernel[(rows,)](logits, logits.stride(0), targets, losses, count, V, ignore,
                         BLOCK=8192 if V > 8192 else 1024, num_warps=32 if V > 8192 else 8)
    return losses.sum(), logits
