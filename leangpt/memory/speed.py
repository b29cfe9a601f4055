"""How long a step takes, predicted: arithmetic over rates that a machine is measured to have.

    products     6 n P, for P weights that multiply, forward and backward; 2 n P again where blocks
                 run by tiles or are checkpointed; K and V again for each tile of queries
    attention    2 B T² C a layer forward, 2.5 times that backward, 2 again when checkpointed
    orthogonal   5 iterations of 4 s N + 2 s³ for each matrix of N numbers, s its shorter side
    bandwidth    weights and state read and written, gradients read; those that are summed in few
                 bits some 20 times, as float32, each micro-batch
    host         what is offloaded, there and back, beside the computation
    launches     small operators of each layer and micro-batch, which cost a time of their own

Rates are a machine's; TYPICAL ones, of an H100 and of one core, are guesses: good for comparing
plans with each other, and for nothing else.
"""

from dataclasses import dataclass

from leangpt.memory.formulas import checkpointed
from leangpt.memory.run import Run
from leangpt.memory.tiles import of_run
from leangpt.memory.update import is_matrix

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
    layer = sum(t.numbers for t in run.tensors if t.in_layer and len(t.shape) > 1)
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
    return run.micro_batches * computing + update_seconds(run, rates)


def update_seconds(run: Run, rates: Rates) -> float:
    """Seconds of the optimizer's share of a step."""
    moved = orthogonal = 0
    for tensor in run.tensors:
        moved += tensor.count * (3 * tensor.bytes + 2 * tensor.state_bytes)
        if is_matrix(tensor):
            for rows in tensor.group["row_blocks"] or (tensor.shape[0],):
                side = min(rows, tensor.shape[1])
                iteration = 4 * side * rows * tensor.shape[1] + 2 * side**3
                orthogonal += tensor.count * tensor.group["ns_steps"] * iteration
    return moved / rates.bandwidth + orthogonal / rates.products
