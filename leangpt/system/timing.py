"""One measured cell: a transformer block under a policy, its time, its peak and its error.

bench.py and the scripts under experiments/ share this, so that their numbers mean the same. The
reference is an attention written out (scores, mask, softmax, weighted sum) in float64: slow,
obviously right, and none of the code that is measured.
"""

import copy
import functools
import gc
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from leangpt.layers.int4_linear import quantize_
from leangpt.memory.meter import (
    is_out_of_memory as is_out_of_memory,  # for the scripts that measure
)
from leangpt.memory.meter import measure_peak
from leangpt.system.errors import UserError
from model import Block, GPTConfig

MIB = 1 << 20
# checkpoint: `recompute` with checkpoint_layers; int4: `cache`, packed weights
POLICIES = ("plain", "cache", "grouped", "recompute", "checkpoint", "int4")
REFERENCE_BYTES = 2 << 30  # past this the float64 reference is left out
REFERENCE_ROWS = 512  # rows compared in a long sequence; up to 4096 rows, all of them


def block_config(policy, T, n_embd, n_head, n_kv_head=None, q_chunk=None, k_chunk=None):
    """GPTConfig of one block under a policy of POLICIES. Raises UserError for an unknown one.

    `plain` is the untiled block over one fused attention kernel. `grouped` has 2 key/value heads
    unless told otherwise.
    """
    if policy not in POLICIES:
        raise UserError(f"unknown policy {policy!r}; choose from: {', '.join(POLICIES)}")
    if policy == "grouped":
        n_kv_head = n_kv_head or 2
    if policy == "plain":
        q_chunk = k_chunk = None
    attention_policy = {"plain": "cache", "int4": "cache", "checkpoint": "recompute"}.get(
        policy, policy
    )
    if attention_policy != "recompute" and q_chunk is None:
        k_chunk = None  # no tiles, nothing to chunk
    return GPTConfig(
        block_size=T,
        vocab_size=1,
        n_layer=1,
        n_head=n_head,
        n_embd=n_embd,
        n_kv_head=n_kv_head,
        attention_policy=attention_policy,
        q_chunk=q_chunk,
        k_chunk=k_chunk,
        position="none",
        checkpoint_layers=policy == "checkpoint",
    )


def build_block(config, device="cpu", dtype=torch.float32, int4=False, seed=1337):
    """(block, exact): a Block with random weights, and the same one before int4 packing.

    Queries and keys are scaled so that attention is as selective as a trained model's: over
    near-uniform weights an error in the attention would hide behind the residual stream.
    """
    torch.manual_seed(seed)
    block = Block(config).eval()
    with torch.no_grad():
        query_and_key_rows = sum(block.attn.c_attn.row_blocks[:2])
        block.attn.c_attn.weight[:query_and_key_rows] *= 3
    exact = block.to(device=device, dtype=dtype)
    if not int4:
        return exact, exact
    return quantize_(copy.deepcopy(exact)), exact


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
    q, k, v = block.attn.c_attn(block.ln_1(x)).split(block.attn.c_attn.row_blocks, dim=-1)
    q = q[:, rows].view(B, -1, G, H // G, D)  # head h reads key/value head h // (H / G)
    k, v = k.view(B, T, G, D), v.view(B, T, G, D)
    y = torch.empty_like(q)
    step = max(1, (256 * MIB) // (B * H * T * 8))
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


def timed(fn, device="cpu"):
    """Seconds of one call, everything queued on the device included."""
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def block_peak(fn, block, x, device="cpu"):
    """Peak bytes of fn() beyond weights and input; the gradients it leaves behind are included."""
    clear_gradients(block, x)
    gc.collect()
    return measure_peak(fn, device)


def quartiles(values):
    """(median, interquartile range) of some numbers."""
    values = torch.tensor(values, dtype=torch.float64)
    low, median, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return median, high - low


def describe_machine(device="cpu"):
    """Name of the device that computes: the GPU's, or the processor's with the thread count."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


@functools.cache  # the commit the run began with
def commit_id():
    """Short id of the checked-out commit, with + where Python or C files differ from it.

    The environment variable LEANGPT_COMMIT has precedence: on a machine that got a copy of the
    files, set it to the output of this function where they came from. '' where nothing is known.
    """
    if told := os.environ.get("LEANGPT_COMMIT"):
        return told
    folder = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments):
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.c")
    except OSError:  # no git on this machine
        commit = ""
    return commit and commit + ("+" if changed else "")
