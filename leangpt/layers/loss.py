"""Cross-entropy over the vocabulary without the (B T, V) logits ever existing at once.

The rows are taken in chunks. While a chunk's logits are there, its gradient is taken too, so
the head's matrix product is never repeated: the forward pass leaves dloss/dhidden (B T, C) and
dloss/dweight (V, C) behind, and the backward pass only scales them.
"""

import torch

# torch.compiler.disable, but torch._dynamo is imported at the first call: 2 s off every start
from torch._compile import _disable_dynamo as graph_break

from leangpt.layers.target_check import outside_vocabulary
from leangpt.system.errors import UserError

CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}  # of logits at once, at most
NOT_COUNTED = -1  # what the chunks see in place of an ignored target, whatever its index


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    norm: torch.nn.Module | None = None,
    *,
    ignore_index: int = -100,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of softmax(norm(hidden) weightᵀ) at targets, as F.cross_entropy's.

    hidden: (..., C) float; weight: (V, C), the head; targets: (...) int64, classes 0 to V - 1, or
    ignore_index, which does not count; norm: a module over rows, or None. Returns a float32 scalar
    (float64 for float64 input), NaN if every target is ignored, as torch's. count: () tensor, what
    the sum of losses is divided by; None: the number of targets that count. Under autocast the
    products run in its dtype; the softmax and the loss are always float32 or wider.

    Raises UserError for targets of another shape or dtype, and for one outside the vocabulary. On
    CUDA, where asking would wait for the device, such a loss is NaN, its gradients are zero, and
    the error is raised by the first call, this or a later one, that finds the device done with it.
    """
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:-1]:
        raise UserError(
            f"targets must be int64 of shape {tuple(hidden.shape[:-1])}, one a row of hidden, not "
            f"{targets.dtype} of shape {tuple(targets.shape)}"
        )
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    counted = targets != ignore_index
    outside = outside_vocabulary(targets, counted, weight.size(0))
    count = counted.sum() if count is None else count
    targets = targets.where(counted if outside is None else counted & ~outside, NOT_COUNTED)
    if torch.is_grad_enabled():
        loss = _loss(norm(hidden) if norm else hidden, weight, targets, count)
    else:
        rows = chunk_rows(len(hidden), weight.size(0), hidden.device.type)
        parts = zip(hidden.split(rows), targets.split(rows))  # nor is norm(hidden) ever whole
        loss = sum(_loss(norm(h) if norm else h, weight, t, count) for h, t in parts)
    return loss if outside is None else loss.masked_fill(outside.any(), torch.nan)


def _loss(hidden, weight, targets, count):
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, count)


def chunk_rows(rows, vocab_size, device_type, element_size=4):
    """How many of `rows` rows have their logits held at once: even chunks, multiples of 64."""
    most = max(64, CHUNK_BYTES.get(device_type, 1 << 24) // (element_size * vocab_size))
    chunks = -(-rows // most)
    return -(-rows // (64 * chunks)) * 64


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    @graph_break
    def forward(ctx, hidden, weight, targets, count):
        device = hidden.device.type
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        rows = chunk_rows(len(hidden), weight.size(0), device, hidden.element_size())
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.empty_like(weight, dtype=wide) if needs_grad else None
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.size(0), rows):
                h, target = hidden[start : start + rows], targets[start : start + rows]
                logits = h @ head.t()  # (rows, V)
                share, grad = _loss_and_grad(logits, target, count)
                loss += share
                if needs_grad:
                    torch.mm(grad, head, out=grad_hidden[start : start + rows])
                    _add_product(grad_weight, grad, h, beta=float(start > 0))
                del logits, grad  # before the next chunk's are made
        if needs_grad:
            if not len(hidden):
                grad_weight.zero_()
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @graph_break
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
        torch.mul(grad_weight, grad, out=scaled)  # on CUDA rounded on the way: no float32 copy
        return grad_hidden * grad.to(grad_hidden.dtype), scaled, None, None


def _add_product(total, grad_logits, h, beta):
    """total (V, C), float32, = beta total + grad_logitsᵀ h, summed in float32 where it can be.

    beta = 0 ignores what total holds, as BLAS does: the first chunk needs no zeros.
    """
    if h.dtype == total.dtype:
        total.addmm_(grad_logits.t(), h, beta=beta)
    elif h.is_cuda:
        torch.addmm(total, grad_logits.t(), h, beta=beta, out_dtype=total.dtype, out=total)
    elif beta:
        total += grad_logits.t() @ h
    else:
        total.copy_(grad_logits.t() @ h)


def _loss_and_grad(logits, target, count):
    """Share of the mean loss of some rows, and dloss/dlogits (rows, V) in their place."""
    if logits.is_cuda:
        from leangpt.layers.loss_triton import (
            loss_and_grad,  # CUDA only: Triton comes with that build
        )

        return loss_and_grad(logits, target, count, NOT_COUNTED)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = (target != NOT_COUNTED).to(wide.dtype)
    target = target.clamp_min(0)[:, None]
    lse = wide.logsumexp(-1, keepdim=True)
    loss = ((lse - wide.gather(-1, target))[:, 0] * counted).sum() / count
    grad = wide.sub_(lse).exp_()  # softmax
    grad.scatter_add_(-1, target, torch.full_like(lse, -1.0))
    return loss, grad.mul_((counted / count)[:, None]).to(logits.dtype)
