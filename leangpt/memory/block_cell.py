"""One measured cell: a transformer block under a policy, its peak and its error.

bench.py, the notebook and the scripts under experiments/ share this, so that their numbers mean the
same. The block's class is handed in; it must look like model.Block: `ln_1`, `attn.c_attn`,
`attn.c_proj`, `ln_2`, `mlp`, `config`. The reference is an attention written out (scores, mask,
softmax, weighted sum) in float64: slow, obviously right, and none of the code that is measured.
"""

import copy
import gc

import torch

from leangpt.memory.meter import measure_peak
from leangpt.system.errors import UserError

CELLS = {  # name: what it sets of GPTConfig
    "plain": dict(attention_policy="cache"),  # the untiled block over one fused attention kernel
    "cache": dict(attention_policy="cache"),
    "grouped": dict(attention_policy="grouped", n_kv_head=2),  # unless told otherwise
    "recompute": dict(attention_policy="recompute"),
    "checkpoint": dict(attention_policy="recompute", checkpoint_layers=True),
    "int4": dict(attention_policy="cache"),  # whose weights are then packed
}
TILES_ITSELF = ("recompute", "checkpoint")  # without a q_chunk
REFERENCE_BYTES = 2 << 30  # past this the float64 reference is left out
REFERENCE_ROWS = 512  # rows compared in a long sequence; up to 4096 rows, all of them
SCORE_BYTES = 256 << 20  # of the reference at a time


def block_arguments(cell, T, n_embd, n_head, n_kv_head=None, q_chunk=None, k_chunk=None):
    """GPTConfig's arguments for one block of CELLS over T tokens. UserError for an unknown one."""
    if cell not in CELLS:
        raise UserError(f"unknown policy {cell!r}; choose from: {', '.join(CELLS)}")
    if cell == "plain":
        q_chunk = k_chunk = None
    if q_chunk is None and cell not in TILES_ITSELF:
        k_chunk = None  # no tiles, nothing to chunk
    arguments = dict(
        block_size=T,
        vocab_size=1,
        n_layer=1,
        n_head=n_head,
        n_embd=n_embd,
        q_chunk=q_chunk,
        k_chunk=k_chunk,
        position="none",
        **CELLS[cell],
    )
    return arguments | ({"n_kv_head": n_kv_head} if n_kv_head else {})


def build_block(Block, config, device="cpu", dtype=torch.float32, seed=1337):
    """A Block with random weights, the same at every call, in evaluation mode.

    Queries and keys are scaled so that attention is as selective as a trained model's: over
    near-uniform weights an error in the attention would hide behind the residual stream.
    """
    torch.manual_seed(seed)
    block = Block(config).eval()
    with torch.no_grad():
        query_and_key_rows = config.n_embd + config.kv_heads * config.head_dim
        block.attn.c_attn.weight[:query_and_key_rows] *= 3
    return block.to(device=device, dtype=dtype)


def random_input(config, B, T, device="cpu", dtype=torch.float32, seed=1337):
    """A residual stream (B, T, C) of unit normal numbers, the same at every call."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(B, T, config.n_embd, generator=generator, device=device, dtype=dtype)


@torch.no_grad()
def reference_rows(block, x, rows):
    """Rows of a block's output by plain softmax attention in float64 -> (B, len(rows), C).

    x (B, T, C); rows (n,) int64. The scores (B, H, n, T) exist for a few rows at a time.
    """
    block, x = copy.deepcopy(block).double(), x.double()
    B, T, C = x.shape
    H, G, D = block.config.n_head, block.config.kv_heads, block.config.head_dim
    q, k, v = block.attn.c_attn(block.ln_1(x)).split([C, G * D, G * D], dim=-1)
    q = q[:, rows].view(B, -1, G, H // G, D)  # head h reads key/value head h // (H / G)
    k, v = k.view(B, T, G, D), v.view(B, T, G, D)
    y = torch.empty_like(q)
    step = max(1, SCORE_BYTES // (B * H * T * 8))
    for start in range(0, len(rows), step):
        tile = slice(start, start + step)
        scores = torch.einsum("bqghd,bkgd->bghqk", q[:, tile], k) / D**0.5
        future = torch.arange(T, device=x.device) > rows[tile, None]  # (q, k)
        weights = scores.masked_fill_(future, float("-inf")).softmax(dim=-1)
        y[:, tile] = torch.einsum("bghqk,bkgd->bqghd", weights, v)
    x = x[:, rows] + block.attn.c_proj(y.reshape(B, -1, C))
    return x + block.mlp(block.ln_2(x))


def max_relative_error(value, reference):
    """Largest |value - reference| over the largest |reference|, in float64."""
    value, reference = value.double(), reference.double()
    return ((value - reference).abs().max() / reference.abs().max()).item()


def forward_error(block, exact, x):
    """Error of block(x) against the reference of `exact`, or None where that is too large.

    Every row is compared up to 4096 rows, 512 rows spread over the sequence beyond.
    """
    B, T, C = x.shape
    if 5 * B * T * C * 8 > REFERENCE_BYTES:
        return None
    rows = torch.arange(T) if T <= 4096 else torch.linspace(0, T - 1, REFERENCE_ROWS).long()
    rows = rows.to(x.device)
    with torch.inference_mode():
        out = block(x)[:, rows]
    return max_relative_error(out, reference_rows(exact, x, rows))


def forward(block, x):
    """One pass without gradients; a tiled policy overwrites x, as it does inside a model."""
    with torch.inference_mode():
        return block(x, inplace=True)


def forward_backward(block, x):
    """One pass and its backward; gradients land in x.grad and in the block's parameters."""
    clear_gradients(block, x)
    out = block(x)
    out.backward(torch.ones_like(out))
    return out


def clear_gradients(block, x):
    """Drop every gradient, so that a measurement of the peak starts without them."""
    x.grad = None
    block.zero_grad(set_to_none=True)


def block_peak(fn, block, x, device="cpu"):
    """Peak bytes of fn() beyond weights and input; the gradients it leaves behind are included."""
    clear_gradients(block, x)
    gc.collect()
    return measure_peak(fn, device)
