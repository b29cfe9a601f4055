"""What the update of weights takes for a moment, beyond weights, gradients and state.

Counted in float32 numbers for each number that is updated at once (a stack of small tensors of one
shape, or one large tensor), as the optimizers' code has them alive (leangpt/optim/):

    kernels of ours, C or Triton                   none; MuonSN in Triton: see orthogonalizing
    gradient as float32, or stacked                1 where it is not so already
    state of a stack                               its own bytes
    momentum in 8 or 4 bits, written               4: value, rounded, two of the dither
    momentum in 16 bits, written                   2.5
    one second moment a number                     1, then its square root 1
    look-ahead (nu, nu1)                           1
    orthogonalizing, from the look-ahead           2 and two Gram matrices; halved in bfloat16
    scaling (a stack, or bfloat16 weights)         2: the direction, and times its scale
    writing bfloat16                               2: that, and the float32 weights; of one tensor
                                                   the noise, a byte of mask, the result: 1.75
"""

import math

import torch

from leangpt.optim.adamsn import SLICE, AdamSN, subset_view
from leangpt.optim.batches import STACK_EACH, STACK_TOTAL
from leangpt.optim.kernels import step_cpu, step_cuda
from leangpt.optim.momentum import BLOCK
from leangpt.optim.muonsn import BFLOAT16_SIDE, MuonSN
from leangpt.system.processor import fast_bfloat16

FLOAT = 4  # bytes


def update_bytes(run, tensors=None) -> int:
    """Bytes that the update of `tensors` (all of the run's, or a few) takes at its worst."""
    return max((_of_stack(run, t, n) for t, n in _stacks(run, tensors or run.tensors)), default=0)


def one_by_one(run, tensors) -> int:
    """The same where each is updated alone, as soon as its gradient is there (fused_backward)."""
    return max((_of_stack(run, t, 1) for t in tensors), default=0)


def _stacks(run, tensors):
    """(tensor, how many like it move together): the largest stack of each shape and settings."""
    alike = {}
    for tensor in tensors:
        key = (tensor.shape, str(tensor.state), tensor.group.get("partition"), is_matrix(tensor))
        first, count = alike.get(key, (tensor, 0))
        alike[key] = first, count + tensor.count
    for tensor, count in alike.values():
        each, total = STACK_EACH, STACK_TOTAL
        if is_matrix(tensor):
            total = step_cuda.MOST if by_kernels(run, tensor) else STACK_EACH
            each = total
        if tensor.numbers > each or not tensor.group.get("foreach", True):
            count = 1
        yield tensor, min(count, max(1, total // tensor.numbers))


def is_matrix(tensor) -> bool:
    """Is it orthogonalised?"""
    group = tensor.group
    return tensor.cls is MuonSN and group.get("orthogonalize") and len(tensor.shape) > 1


def by_kernels(run, tensor) -> bool:
    """Do kernels of ours update it, or torch's fused AdamW?"""
    if tensor.cls is torch.optim.AdamW:
        return True
    group, shape = tensor.group, tensor.shape
    if len(shape) < 2 or group.get("update_clip") is not None or not group["foreach"]:
        return False
    bits = momentum_bits(tensor)
    if bits in (8, 4) and math.prod(shape[1:]) % BLOCK:
        return False
    subsets = True
    if issubclass(tensor.cls, AdamSN) and not is_matrix(tensor):
        view, dims = subset_view(shape, group)
        by_row = dims == (2,) and len(view) == 2 and view[0] == shape[0]
        subsets = by_row or (dims == (3,) and view[2] == BLOCK)
    if run.device_type == "cuda":
        return subsets and math.prod(shape[1:]) <= step_cuda.WIDEST
    if is_matrix(tensor) or tensor.itemsize != FLOAT or bits in (16, 4):
        return False
    return subsets and run.device_type == "cpu" and step_cpu.library() is not None


def momentum_bits(tensor) -> int:
    """Bits of a number of its momentum; 0 without one."""
    if "momentum" not in tensor.state:
        return 0
    dtype = tensor.state["momentum"][1]
    return {torch.int8: 8, torch.uint8: 4, torch.bfloat16: 16}.get(dtype, 32)


def _of_stack(run, tensor, count):
    numbers, group = tensor.numbers * count, tensor.group
    if by_kernels(run, tensor):
        if is_matrix(tensor):  # step_cuda.muonsn: what is orthogonalised and its result
            return orthogonalizing(run, tensor, count, 2) + numbers * 2
        if "column_mean_square" in tensor.state:
            return _adafactor_scratch(run, tensor, count)
        return 0
    stacked, narrow, bits = count > 1, tensor.itemsize < FLOAT, momentum_bits(tensor)
    state = tensor.state_bytes * count if stacked else 0
    if not is_matrix(tensor) and not stacked and len(tensor.shape) == 2:
        numbers = min(numbers, SLICE)  # AdamSN's rows, so many at a time
    value = 1 if bits in (16, 8, 4) else 0
    ahead = 1 if bits and (is_matrix(tensor) or group.get("nu1", 1) != 1) else 0
    second = 0 if _few_seconds(tensor) else 1
    orthogonal = 0
    if is_matrix(tensor):
        orthogonal = orthogonalizing(run, tensor, count, FLOAT) / FLOAT / numbers
    # is the direction a tensor of its own, or the momentum as it is stored?
    own = is_matrix(tensor) or not issubclass(tensor.cls, AdamSN)
    update = 1 if value or ahead or own or stacked else 0
    before = (1 if stacked or narrow else 0) * numbers * FLOAT + state  # gradients, states
    writing = 0
    if stacked or narrow:
        writing = max(update + second + 1, 1 + narrow * (1 + (1 + 0.25 + 0.5) / count))
    phases = (
        before + {16: 2.5, 8: 4, 4: 4}.get(bits, 0) * numbers * FLOAT,
        before + (value + ahead + second + orthogonal) * numbers * FLOAT,
        max(update + second, writing) * numbers * FLOAT,
    )
    return int(max(phases))


def _few_seconds(tensor):
    """Has it fewer second moments than numbers?"""
    for name in ("second_moment", "mean_square"):
        if name in tensor.state:
            return math.prod(tensor.state[name][0]) < tensor.numbers
    return True


def orthogonalizing(run, tensor, count, size):
    """Bytes of Newton-Schulz beyond its input, whose numbers have `size` bytes."""
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    blocks = tensor.group["row_blocks"] or (rows,)
    if sum(blocks) != rows:
        blocks = (rows,)
    numbers = rows * columns * count
    side = min(blocks[0], columns)
    cpu = run.device_type == "cpu"
    half = not cpu or (fast_bfloat16() and side >= BFLOAT16_SIDE)
    each = 2 if half else size
    if len(set(blocks)) == 1:
        count, share = count * len(blocks), 1.0
    else:
        share = blocks[0] / rows
    grams = 2 * count * min(blocks[0], columns) ** 2 * each
    iterating = 2 * share * numbers * each + grams
    joined = 2 * numbers * size if len(set(blocks)) > 1 else 0
    return max(iterating, joined)


def _adafactor_scratch(run, tensor, count):
    """Sums over tiles of rows, before they are added up (kernels/step_cpu.py)."""
    if run.device_type != "cpu":
        return 0
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    least, most = step_cpu.TILE_ROWS
    tiles = -(-rows // max(least, min(most, rows // step_cpu.TILES)))
    return FLOAT * (tiles * (columns + 2) + columns)
