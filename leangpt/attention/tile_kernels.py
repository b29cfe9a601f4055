"""Attention over one tile, with the logsumexp that lets tiles be merged exactly.

A row's attention over keys A and B together follows from its attention over each apart:

    lse = logaddexp(lse_a, lse_b);   out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)

(Rabe & Staats 2021, arXiv 2112.05682; FlashAttention, 2205.14135). The backward of a tile needs
only the merged out and lse, so tiles can be visited again in any order, as ring attention does.

Four kernels with one signature, chosen in `tile_kernel` alone:
  math    plain PyTorch, any device and dtype: the reference the others are tested against
  cpu     PyTorch's fused CPU kernel (float32, float64, bfloat16)
  flash   FlashAttention-2 on CUDA (float16, bfloat16)
  cudnn   cuDNN's, the fastest on Hopper; it builds a plan per shape, so it wants few shapes

Shapes: q (B, H, t, D); k, v (B, G, s, D) with G dividing H; out like q; lse (B, H, t) float32
(float64 for float64). causal=True needs t == s and masks above the diagonal.
"""

import math

import torch

aten = torch.ops.aten


def math_forward(q, k, v, causal):
    """Attention written out: the kernel of float64, and of devices that have no other."""
    scores = _scores(q, k, causal)  # (B, G, g, t, s)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse[..., None]).to(v.dtype) @ v[:, :, None]
    return out.flatten(1, 2), lse.flatten(1, 2)


def math_backward(grad, q, k, v, out, lse, causal):
    """Its gradients from the saved logsumexp: P is made again, dS = P (dP - rowsum(dO O))."""
    B, H, t, D = q.shape
    G = k.size(1)
    split = (B, G, H // G, t)
    p = torch.exp(_scores(q, k, causal) - lse.view(*split, 1))  # (B, G, g, t, s)
    grad, out, q = (x.to(p.dtype).reshape(*split, D) for x in (grad, out, q))
    k, v = k.to(p.dtype)[:, :, None], v.to(p.dtype)[:, :, None]
    dv = (p.transpose(-1, -2) @ grad).sum(2)
    dp = grad @ v.transpose(-1, -2)
    ds = p * (dp - (grad * out).sum(-1, keepdim=True)) / math.sqrt(D)
    dq = (ds @ k).flatten(1, 2)
    dk = (ds.transpose(-1, -2) @ q).sum(2)
    return dq, dk, dv


def _scores(q, k, causal):
    """q kᵀ / sqrt(D) by group, (B, G, g, t, s), in float32 or better."""
    B, H, t, D = q.shape
    G, s = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(B, G, H // G, t, D).to(wide)
    scores = grouped @ k.to(wide)[:, :, None].transpose(-1, -2) / math.sqrt(D)
    if causal:
        above = torch.ones(t, s, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, -math.inf)
    return scores


def cpu_forward(q, k, v, causal):
    """PyTorch's fused kernel for CPUs."""
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def cpu_backward(grad, q, k, v, out, lse, causal):
    """Its backward, from the saved logsumexp."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal
    )


def flash_forward(q, k, v, causal):
    """FlashAttention-2 (Dao, arXiv 2307.08691), as PyTorch ships it."""
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    return out, lse


def flash_backward(grad, q, k, v, out, lse, causal):
    """Its backward, from the saved logsumexp."""
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.size(2), k.size(2), 0.0, causal, *_no_philox(q)
    )


def cudnn_forward(q, k, v, causal):
    """cuDNN's fused attention: the fastest on Hopper."""
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
    return out, lse.view(q.shape[:3])  # cuDNN's is (B, H, t, 1)


def cudnn_backward(grad, q, k, v, out, lse, causal):
    """Its backward, from the saved logsumexp."""
    # its plan is made for q's order of dimensions in memory, and it reads others wrongly
    grad, out = match_layout(grad, q), match_layout(out, q)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse.view(*q.shape[:3], 1),
        *_no_philox(q),
        None,
        None,
        None,
        q.size(2),
        k.size(2),
        0.0,
        causal,
    )


def match_layout(x, like):
    """x itself if its dimensions lie in memory as those of `like` do, densely; else a copy."""
    wanted = torch.empty_like(like)
    same = all(a == b for n, a, b in zip(x.shape, x.stride(), wanted.stride()) if n > 1)
    return x if same else wanted.copy_(x)


def _no_philox(q):
    """Seed and offset of a dropout that is off; the kernels still ask for the tensors."""
    return (torch.empty(0, dtype=torch.int64, device=q.device) for _ in range(2))


KERNELS = {
    "math": (math_forward, math_backward),
    "cpu": (cpu_forward, cpu_backward),
    "flash": (flash_forward, flash_backward),
    "cudnn": (cudnn_forward, cudnn_backward),
}


def tile_kernel(q, k, fixed_shapes=False):
    """Name of the kernel for these tiles; `fixed_shapes` says that few shapes will be asked for."""
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64, torch.bfloat16):
        return "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and half and q.size(-1) % 8 == 0 and q.size(-1) <= 128:
        hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
        return "cudnn" if fixed_shapes and hopper else "flash"
    return "math"


def tile_forward(q, k, v, causal, fixed_shapes=False):
    """(out, lse) of one tile; see the top of the file for shapes."""
    forward, _ = KERNELS[tile_kernel(q, k, fixed_shapes)]
    return forward(q, k, v, causal)


def tile_backward(grad, q, k, v, out, lse, causal, fixed_shapes=False):
    """(dq, dk, dv) of one tile, given the merged out and lse of its rows over all keys."""
    _, backward = KERNELS[tile_kernel(q, k, fixed_shapes)]
    return backward(grad, q, k, v, out, lse, causal)


def merge_(out, lse, tile_out, tile_lse):
    """Merge a tile into out (B, H, t, D) and lse (B, H, t), both float32 or wider, in place.

    exp(lse_b - logaddexp(lse_a, lse_b)) = sigmoid(lse_b - lse_a), so the merge is one lerp.
    """
    if out.is_cuda and out.dtype == torch.float32:
        from leangpt.attention.merge_triton import merge_  # CUDA only: Triton comes with that build

        return merge_(out, lse, tile_out, tile_lse)
    weight = torch.sigmoid(tile_lse - lse)
    out.lerp_(tile_out.to(out.dtype), weight[..., None].to(out.dtype))
    torch.logaddexp(lse, tile_lse, out=lse)
