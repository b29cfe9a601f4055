"""How long a step takes, predicted: arithmetic over rates that a machine is measured to have.

    products     6 n P, for P weights that multiply, forward and backward; 2 n P again where blocks
                 run by tiles or are checkpointed; K and V again for each tile of queries
    attention    2 B T² C a layer forward, 2.5 times that backward, 2 again when checkpointed
    orthogonal   5 iterations of 4 s N + 2 s³ for each matrix of N numbers, s its shorter side
    bandwidth    weights and state read and written, gradients read; those that are summed in few
                 bits some 20 times, as float32, each micro-batch
    host         what is offloaded, there and back, beside the computation
    messages     between processes, by docs/ARCHITECTURE.md's bytes, behind the computation: they
                 count where they take longer. LINK bytes a second and LATENCY a message are
                 assumed, not measured, of GPUs of one host (and of gloo on a CPU); MuonSN's are
                 not hidden
    launches     small operators of each layer and micro-batch, which cost a time of their own

Rates are a machine's, measured once and kept (`calibrate`); TYPICAL ones, of an H100 and of one
core, are guesses: good for comparing plans with each other, and for nothing else.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn import functional as F

from leangpt.memory.formulas import checkpointed
from leangpt.memory.run import Run
from leangpt.memory.tiles import of_run
from leangpt.memory.update import is_matrix
from leangpt.system.cache import cache_folder
from leangpt.system.timing import describe_machine, quartiles, timed
from leangpt.system.whole_files import write_whole

REPEATS = 5  # of what is measured: the median counts
LINK = {"cuda": 2e11, "cpu": 1e9}  # bytes a second that a process sends
LATENCY = 2e-5  # seconds of a message
LAUNCHES = 60  # of a layer, forward and backward
ADDING = 160  # bytes read and written to add a number to a sum in few bits, in 20 operators


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, and whether this one was measured."""

    products: float  # floating-point operations in matrix products of the stream's dtype
    attention: float  # the same in the fused attention kernel
    bandwidth: float  # bytes
    host: float  # bytes, between device and pinned host memory
    launch: float  # seconds of one small operator
    measured: bool = False


TYPICAL = {
    ("cuda", 2): Rates(4.5e14, 3.5e14, 2.5e12, 4e10, 4e-6),
    ("cuda", 4): Rates(2.0e14, 3e13, 2.5e12, 4e10, 4e-6),
    ("cpu", 2): Rates(6e10, 4e10, 1e10, 1e10, 8e-6),
    ("cpu", 4): Rates(6e10, 4e10, 1e10, 1e10, 8e-6),
}


def typical(run: Run) -> Rates:
    """Rates to compare plans by, where this machine was not measured."""
    return TYPICAL["cuda" if run.device_type == "cuda" else "cpu", run.stream_bytes]


def seconds(run: Run, rates: Rates | None = None) -> float:
    """Seconds of one step of a Run, on each of its processes."""
    rates, c, tiled = rates or typical(run), run.config, of_run(run)
    n, T, C, L = run.tokens, run.length, c.n_embd, c.n_layer
    layer = sum(t.whole for t in run.tensors if t.in_layer and len(t.shape) > 1)
    again = tiled is not None
    K = checkpointed(c)  # layers that are computed again
    products = n * (6 * (L * layer + c.vocab_size * C) + 2 * again * K * layer)
    attention = n * T * C * (7 * L + 2 * K * c.checkpoint_layers)
    if again and c.policy.recomputes:  # K and V for each tile of queries, in both directions
        per_tile = 2 * 2 * (c.kv_heads / c.n_head) * C * C
        products += 2 * L * n * per_tile * max(0, T / tiled.q - 1) / 2
    computing = products / rates.products + attention / rates.attention
    computing += rates.launch * LAUNCHES * L * (1 + again * max(1, T // tiled.q if tiled else 1))
    if c.offload:
        computing = max(computing, 2 * L * n * C * run.stream_bytes / rates.host)
    if run.gradient_bits:
        numbers = sum(t.count * t.numbers for t in run.tensors)
        computing += ADDING * numbers / rates.bandwidth
    sent, messages = sent_bytes(run)
    computing = max(run.micro_batches * computing, sent / link(run))
    return computing + LATENCY * messages + update_seconds(run, rates)


def link(run) -> float:
    """Bytes a second that a process sends to others, assumed."""
    return LINK["cuda" if run.device_type == "cuda" else "cpu"]


def sent_bytes(run: Run) -> tuple[float, int]:
    """(bytes, messages) that a process sends in a step, the optimizer's own left out."""
    if run.processes == 1:
        return 0, 0
    c, e, R, K = run.config, run.stream_bytes, run.processes, run.context_parallel
    P = sum(t.count * t.whole for t in run.tensors)
    gradients = 2 if run.shares == 1 else 1
    sent = gradients * run.param_bytes * P * (R - 1) / R
    messages = 1 + P * run.param_bytes // 25_000_000  # DDP's buckets
    if run.shares > 1:
        sent += run.micro_batches * 2 * e * P * (R - 1) / R
        messages = (2 * run.micro_batches + 1) * (c.n_layer + 1)
    if K > 1:
        tiles = of_run(run)
        groups = max(1, run.rows // (2 * tiles.q))
        keys = 0.75 * run.batch_size * run.length * 2 * c.kv_heads * c.head_dim * (K - 1) / K
        sent += run.micro_batches * c.n_layer * keys * (e * groups + e + 4)
        pieces = 2 * (K - 1) * max(1, run.rows // (2 * tiles.k))
        messages += run.micro_batches * c.n_layer * pieces * (groups + 1)
    return sent, messages


def update_seconds(run: Run, rates: Rates) -> float:
    """Seconds of the optimizer's share of a step."""
    moved = orthogonal = sent = 0
    for tensor in run.tensors:
        moved += tensor.count * (3 * tensor.bytes + 2 * tensor.state_bytes)
        if is_matrix(tensor):
            for rows in tensor.group["row_blocks"] or (tensor.rows,):
                side = min(rows, tensor.shape[1])
                iteration = 4 * side * rows * tensor.shape[1] + 2 * side**3
                orthogonal += tensor.count * tensor.group["ns_steps"] * iteration
            if run.shares > 1:  # to their owners and back
                travelling = 2 if run.device_type == "cuda" else 4
                sent += tensor.count * 2 * travelling * tensor.numbers
    moved, orthogonal = moved / rates.bandwidth, orthogonal / run.shares / rates.products
    return moved + orthogonal + sent / link(run)


# ---------------------------------------------------------------------- a machine's rates


def rates_file(device: torch.device, dtype: torch.dtype):
    """Where the rates of this machine are kept -> Path."""
    key = f"{describe_machine(device)} {torch.__version__} {dtype} {torch.get_num_threads()}"
    return cache_folder() / f"rates-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def known_rates(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """What `calibrate` measured here before; None: nothing, or a file that is none of its."""
    try:
        return Rates(**json.loads(rates_file(device, dtype).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def calibrate(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure products, attention, bandwidth, the way to the host and launches, and keep them."""
    cuda = device.type == "cuda"
    n = 4096 if cuda else 768
    a = torch.randn(n, n, device=device, dtype=dtype)
    products = 2 * n**3 / median(lambda: a @ a, device)
    T, H, D = (4096, 16, 64) if cuda else (1024, 4, 64)
    q = torch.randn(1, H, T, D, device=device, dtype=dtype)
    attend = partial(F.scaled_dot_product_attention, q, q, q, is_causal=True)
    attention = 2 * T * T * H * D / median(attend, device)
    many = torch.empty(1 << (28 if cuda else 25), device=device, dtype=torch.float32)
    bandwidth = 2 * many.numel() * 4 / median(lambda: many.add_(1), device)
    host = bandwidth
    if cuda:
        pinned = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(pinned, device=device)
        host = pinned.numel() / median(lambda: there.copy_(pinned, non_blocking=True), device)
    small = torch.zeros(8, device=device)

    def launches():
        for _ in range(100):
            small.add_(1)

    rates = Rates(products, attention, bandwidth, host, median(launches, device) / 100, True)
    path = rates_file(device, dtype)
    write_whole(path, json.dumps(asdict(rates), indent=1).encode())
    return rates


def median(work, device) -> float:
    """Median time of `work`, after one call that does not count."""
    work()
    return quartiles([timed(work, device) for _ in range(REPEATS)])[0]
