"""AdamSN: Adam whose second moment is one number per *subset* of a weight, not one per element.

Nguyen & Nguyen, "Subset-Norm and Subspace-Momentum" (arXiv 2411.07120), Algorithm 1 on Adam. With
g the gradient and S the subset of element i,

    m_i <- b1 m_i + (1 - b1) g_i
    v_S <- b2 v_S + (1 - b2) N(g_j, j in S)      N = sum of squares (the paper) or their mean
    u_i  = (1 - nu1) g_i + nu1 m_i / (1 - b1^t)
    p_i <- (1 - lr wd) p_i - lr u_i / (sqrt(v_S / (1 - b2^t)) + eps)

With the mean, v_S has the size of Adam's v, so AdamW's learning rate carries over; with the sum,
lr must grow by the square root of the subset's size. nu1 = 1 is Adam's momentum, less the
quasi-hyperbolic one of QHAdam (Ma & Yarats, arXiv 1810.06801, equation 15), which costs no state.
One element per subset with nu1 = 1 is AdamW itself.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from leangpt.optim.arithmetic import compute_dtype, mean_square, shift, whole_mean_square
from leangpt.optim.base import COMMON_HELP, MemoryOptimizer, say_once
from leangpt.optim.batches import STACK_EACH, is_plain
from leangpt.optim.momentum import BLOCK, new_momentum, update_momentum
from leangpt.system.errors import UserError

SLICE = 1 << 24  # numbers of a matrix that go through float32 at a time
PARTITIONS = ("row", "larger", "element")


class AdamSN(MemoryOptimizer):
    __doc__ = f"""Adam with Subset-Norm, a drop-in `torch.optim.Optimizer`.

    params               parameters or groups; every option below can be set per group
    lr                   learning rate (float or 0-dim tensor)
    betas, eps           as Adam's; betas[0] = 0 stores no momentum
    nu1                  weight of the momentum in the update, the gradient having the rest
    weight_decay         decoupled (AdamW)
    partition            the subsets of a matrix (n, m); more dimensions are flattened to (n, -1):
                         "row"     one output row, v has n numbers
                         "larger"  the paper's: lines along the longer side, min(n, m) numbers;
                         where those are columns, the row_blocks apart
                         an int k  runs of k numbers, n * m / k numbers
                         "element" plain Adam. Vectors are always plain Adam.
    norm                 "mean" or "sum" (the paper's)
    momentum_bits        32, 16, 8 or 4 bits per number for a matrix's m (see optim/momentum.py);
                         vectors keep 32
    row_blocks           of groups: how many rows each of the matrices stacked in one weight has,
                         as (rows of q, of k, of v); None: it is one matrix
    {COMMON_HELP}
    State: momentum in the parameter's shape, or codes and scales; second_moment, float32, with as
    many numbers as subsets.
    Raises UserError for hyperparameters without meaning and for sparse gradients.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        *,
        nu1=1.0,
        partition="row",
        norm="mean",
        momentum_bits=32,
        row_blocks=None,
        **common,
    ):
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            nu1=nu1,
            partition=partition,
            norm=norm,
            momentum_bits=momentum_bits,
            row_blocks=row_blocks,
        )
        super().__init__(params, defaults, **common)

    def check_group(self, group):
        super().check_group(group)
        check_partition(group["partition"])
        if not 0 <= group["nu1"] <= 1:
            raise UserError(f"nu1 must lie in [0, 1], not {group['nu1']}")
        if group["norm"] not in ("mean", "sum"):
            raise UserError(f"norm must be 'mean' or 'sum', not {group['norm']!r}")

    def new_state(self, tensor, group, shards=None):
        view, dims = subset_view(tensor.shape, group, shards)
        kept = [1 if d in dims else size for d, size in enumerate(view, start=1)]
        wide = compute_dtype(tensor)
        state = {"second_moment": torch.zeros(kept, dtype=wide, device=tensor.device)}
        if group["betas"][0] > 0:
            state |= new_momentum(tensor, group["momentum_bits"] if tensor.ndim > 1 else 32)
        return state

    def spans_rows(self, name, tensor, group, shards):
        return name == "second_moment" and 1 in subset_view(tensor.shape, group, shards)[1]

    def needs_ranks(self, tensor, group, shards):
        partition = group["partition"]
        if super().needs_ranks(tensor, group, shards):
            return True
        if tensor.ndim < 2 or partition in ("row", "element"):
            return False
        columns = math.prod(tensor.shape[1:])
        return not isinstance(partition, int) or columns % partition > 0  # not runs within rows

    def schedule(self, group, step):
        """The gradient's share of u against the momentum's; the sum of both weights; 1 - b2^t."""
        (beta1, beta2), nu1 = group["betas"], group["nu1"]
        weight = 1 - nu1 + nu1 / (1 - beta1**step)
        return (1 - nu1) / weight, weight, 1 - beta2**step

    def direction(self, batch):
        group, second = batch.group, batch.state["second_moment"]
        (beta1, beta2), (share, weight, correction2) = group["betas"], batch.schedule[:3]
        momentum = update_momentum(batch.state, batch.grad, beta1, batch.step, batch.generator)
        view, dims = subset_view(batch.grad.shape[1:], group, batch.shards)
        grad = batch.grad.reshape(len(batch.grad), *view)
        if 1 in dims:
            squares = yield from whole_mean_square(grad, dims, batch.shards)
            squares = subset_sum(squares, grad, dims, group["norm"], batch.shards)
        else:
            squares = subset_norm(grad, dims, group["norm"])
        second.lerp_(squares, 1 - beta2)
        del squares  # one a number, where each has its own
        scale = (second / correction2).sqrt_().add_(group["eps"]).reciprocal_().mul_(weight)
        update = momentum if group["nu1"] == 1 else momentum.lerp(batch.grad, share)
        return update.reshape(grad.shape), scale

    def update(self, items):
        """By the kernels what they take; large plain float32 tensors by the multi-tensor kernels
        below; the rest as any."""
        items = self.kept.kernels.run(items, kernels_support, self.launch)
        large = [i for i in items if is_large(i)]
        for key, same in by_key(large, adam_key).items():
            if key[0] == "element":
                update_elements(same)
            else:
                update_subsets(same, self.schedule(same[0].group, same[0].step)[:3])
        taken = set(map(id, large))
        rest = [i for i in items if id(i) not in taken]
        super().update([part for item in rest for part in row_slices(item)])

    def launch(self, stack):
        stack.adamsn(*self.schedule(stack.group, stack.step)[:3])


def row_slices(item):
    """Runs of rows of one very large matrix as items of their own, or the item itself.

    Arithmetic is float32, so a bfloat16 matrix with an 8-bit momentum needs many times its own
    bytes for a moment; in slices that moment is bounded. Only where rows are independent.
    """
    shape, size = item.param.shape, item.param.numel()
    view, dims = subset_view(shape, item.group)
    rows_alone = 1 not in dims and view[:1] == shape[:1]
    if size <= SLICE or len(shape) != 2 or item.shards or not rows_alone:
        return [item]
    step = max(BLOCK, SLICE // shape[1] // BLOCK * BLOCK)  # whole blocks of codes in a slice
    slices = []
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        state = {}
        for name, value in item.state.items():
            if value.shape == shape or name == "second_moment":
                state[name] = value[rows]
            else:  # codes and scales lie in blocks over the flattened matrix
                blocks = slice(start * shape[1] // BLOCK, (start + step) * shape[1] // BLOCK)
                state[name] = value[blocks]
        slices.append(replace(item, param=item.param[rows], grad=item.grad[rows], state=state))
    return slices


def kernels_support(item):
    """Has this matrix one second moment for each row of (n, -1), or for each BLOCK of a row?"""
    view, dims = subset_view(item.param.shape, item.group, item.shards)
    by_row = dims == (2,) and len(view) == 2 and view[0] == item.param.shape[0]
    return by_row or (dims == (3,) and view[2] == BLOCK)


def is_large(item):
    """Do the multi-tensor kernels below take it? They need no stack and have no update_clip."""
    group = item.group
    if item.param.numel() <= STACK_EACH and not elements_on_gpu(item):
        return False
    plain = group["foreach"] and group["update_clip"] is None and is_plain(item)
    return plain and group["betas"][0] > 0


def elements_on_gpu(item):
    """Plain Adam on CUDA, where one kernel takes tensors of every size?"""
    p, group = item.param, item.group
    plain = group["nu1"] == 1 and not subset_view(p.shape, group, item.shards)[1]
    return p.is_cuda and p.numel() > 0 and plain


def adam_key(item):
    """What the items of one multi-tensor call must share."""
    group = item.group
    _, dims = subset_view(item.param.shape, group)
    key = (item.param.device, item.step, group["betas"], group["nu1"], group["eps"], group["norm"])
    if dims or group["nu1"] != 1:
        return "subset", *key
    return "element", *key, group["lr"], group["weight_decay"]  # torch's kernel takes one rate


def by_key(items, key):
    """Items -> {key(item): its items}, in their order."""
    buckets = {}
    for item in items:
        buckets.setdefault(key(item), []).append(item)
    return buckets


def update_elements(items):
    """Plain AdamW on float32 items that share all hyperparameters: torch's own fused kernel."""
    group, step = items[0].group, items[0].step
    steps = torch.full((), float(step), device=items[0].param.device)
    torch._fused_adamw_(
        [i.param for i in items],
        [i.grad for i in items],
        [i.state["momentum"] for i in items],
        [i.state["second_moment"] for i in items],
        [],
        [steps] * len(items),
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def update_subsets(items, schedule):
    """AdamSN on large float32 items of any shapes, in few launches and passes over the weights.

    First every momentum and subset norm, which read the same gradient; then all the small second
    moments at once, by multi-tensor kernels; then every weight.
    """
    (beta1, beta2), nu1 = items[0].group["betas"], items[0].group["nu1"]
    share, weight, correction2 = schedule
    views = [subset_view(i.param.shape, i.group) for i in items]
    norms = []
    for i, (view, dims) in zip(items, views):
        i.state["momentum"].lerp_(i.grad, 1 - beta1)
        norms.append(subset_norm(i.grad.view(1, *view), dims, i.group["norm"])[0])
    seconds = [i.state["second_moment"] for i in items]
    torch._foreach_lerp_(seconds, norms, 1 - beta2)
    scales = torch._foreach_div(seconds, correction2)
    torch._foreach_sqrt_(scales)
    torch._foreach_add_(scales, items[0].group["eps"])
    torch._foreach_reciprocal_(scales)
    for i, scale, (view, _) in zip(items, scales, views):
        rate, decay = i.group["lr"] * weight, 1 - i.group["lr"] * i.group["weight_decay"]
        update = i.state["momentum"] if nu1 == 1 else i.state["momentum"].lerp(i.grad, share)
        shift(i.param, update.view(view), scale, decay, rate)


def subset_norm(grad, dims, norm):
    """N(g_j, j in S) for every subset S: grad (N, *view) -> (N, *view with `dims` of size 1).

    At most the largest finite number: an infinite second moment would stay so, or turn to nan.
    """
    if not dims:
        return grad.square().clamp_(max=torch.finfo(grad.dtype).max)
    return subset_sum(mean_square(grad, dims), grad, dims, norm)


def subset_sum(means, grad, dims, norm, shards=None):
    """N from the mean squares of subsets: themselves, or times the subsets' size."""
    if norm == "sum":
        rows = shards.rows if shards else grad.shape[1]
        means.mul_(math.prod([rows if d == 1 else grad.shape[d] for d in dims]))
    return means.clamp_(max=torch.finfo(grad.dtype).max)


def check_partition(partition):
    """Raise UserError unless AdamSN knows this partition."""
    whole = isinstance(partition, int) and not isinstance(partition, bool)
    if not (partition in PARTITIONS or (whole and partition >= 1)):
        names = ", ".join(PARTITIONS)
        raise UserError(f"partition must be one of {names} or a positive int, not {partition!r}")


def subset_view(shape, group, shards=None):
    """How a tensor of `shape` falls into subsets: (view, dims).

    The tensor, viewed as (N, *view), has one subset for each index of the dimensions that are not
    in `dims` (counted with the batch dimension, so they start at 1). Where a partition does not
    fit, the nearest that does is taken and said once: a run length becomes the nearest divisor;
    and of a tensor sharded over ranks, runs that could cross ranks become rows.
    """
    partition = group["partition"]
    if len(shape) < 2 or partition in ("element", 1):
        return tuple(shape), ()
    rows, columns = shape[0], math.prod(shape[1:])
    runs = isinstance(partition, int) and columns % partition == 0  # within rows
    if shards and isinstance(partition, int) and not runs:
        say_once(f"partition {partition} becomes 'row' for weights sharded over ranks")
        partition = "row"
    if runs:
        return (rows, columns // partition, partition), (3,)
    if isinstance(partition, int):
        run = nearest_divisor(rows * columns, partition)
        return (rows * columns // run, run), (2,)
    if partition == "row" or columns > (shards.rows if shards else rows):
        return (rows, columns), (2,)
    block = math.gcd(*group["row_blocks"]) if group["row_blocks"] else rows
    if block == rows or rows % block or shards:
        return (rows, columns), (1,)
    return (rows // block, block, columns), (2,)  # q, k, v apart


def nearest_divisor(number, wanted):
    """The divisor of `number` nearest to `wanted` in ratio."""
    if number % wanted == 0 or number == 0:
        return wanted
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = small + [number // d for d in small]
    nearest = min(divisors, key=lambda d: abs(math.log(d / wanted)))
    say_once(f"partition {wanted} does not divide {number} weights: runs of {nearest} instead")
    return nearest
