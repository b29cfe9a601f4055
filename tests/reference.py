"""The plain reference: attention and blocks written out in float64, with nothing clever."""

import math

import torch
from torch.nn import functional as F


def softmax_attention(q, k, v):
    """Causal softmax(q kᵀ / sqrt(D)) v: q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D)."""
    g = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(g, dim=1), v.repeat_interleave(g, dim=1)
    T = q.size(2)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v


def plain_block(block, x):
    """A Block of norm="layernorm", mlp="gelu", rope or not, by the textbook: (B, T, C)."""
    attn, config = block.attn, block.config
    B, T, C = x.shape
    h = F.layer_norm(x, (C,), block.ln_1.weight, block.ln_1.bias, config.norm_eps)
    qkv = h @ attn.c_attn.weight.T
    if attn.c_attn.bias is not None:
        qkv = qkv + attn.c_attn.bias
    widths = (C, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim)
    q, k, v = (
        part.reshape(B, T, -1, config.head_dim).transpose(1, 2)
        for part in qkv.split(widths, dim=-1)
    )
    if config.position == "rope":
        q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    y = softmax_attention(q, k, v).transpose(1, 2).reshape(B, T, C)
    x = x + F.linear(y, attn.c_proj.weight, attn.c_proj.bias)
    h = F.layer_norm(x, (C,), block.ln_2.weight, block.ln_2.bias, config.norm_eps)
    h = F.gelu(F.linear(h, block.mlp.c_fc.weight, block.mlp.c_fc.bias))
    return x + F.linear(h, block.mlp.c_proj.weight, block.mlp.c_proj.bias)


def rotate(x, theta):
    """Rotary embedding as complex multiplication: number i paired with number i + D/2.

    The angles are float32 whatever x is, as in the models that were trained with them.
    """
    T, D = x.shape[-2:]
    frequency = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle = torch.arange(T, dtype=torch.float32)[:, None] * frequency
    turn = torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype))
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * turn
    return torch.cat((turned.real, turned.imag), -1)


def relative_error(found, expected):
    """|found - expected| / |expected|, in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))
