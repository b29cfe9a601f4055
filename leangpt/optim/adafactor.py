"""Adafactor: the second moment of a matrix as its row means and column means, no momentum.

Shazeer & Stern, "Adafactor" (arXiv 1804.04235), Algorithm 4. For a gradient g (n, m) at step t,
with b = min(beta2, 1 - t^-decay) (section 7.2; it needs no bias correction),

    R <- b R + (1 - b) (mean of g² over each row + eps1)             n numbers
    C <- b C + (1 - b) (mean of g² over each column + eps1)          m numbers
    U  = g / sqrt(R Cᵀ / mean(R))                                    the best rank-1 V (section 3)
    U <- U / max(1, RMS(U) / clip)                                   update clipping (section 6)
    p <- (1 - lr wd) p - lr U                                        or the momentum of U for U

R Cᵀ is never formed: U is g scaled by rows, then by columns. The learning rate is what the
caller says; `relative_step=True` multiplies it by the paper's max(eps2, RMS(p)) min(1e-2, t^-0.5)
(section 8), so lr = 1 is then the paper's schedule.
"""

import math
from collections.abc import Iterable

import torch

from leangpt.optim.arithmetic import (
    HUGEST,
    clip_update,
    compute_dtype,
    mean_square,
    whole_mean_square,
    zeros_as,
)
from leangpt.optim.base import COMMON_HELP, MemoryOptimizer, check_number
from leangpt.optim.momentum import new_momentum, update_momentum
from leangpt.system.errors import UserError

CACHED = 1 << 18  # numbers that fit in a CPU core's second-level cache: 1 MB


class Adafactor(MemoryOptimizer):
    __doc__ = f"""Adafactor, a drop-in `torch.optim.Optimizer`.

    params         parameters or groups. Matrices are factored (more dimensions are flattened to
                   (n, -1)); vectors keep one per element, as in the paper
    factored       False: matrices keep a second moment per element too
    lr             explicit learning rate (float or 0-dim tensor); a factor under relative_step
    beta2, decay   second-moment decay min(beta2, 1 - t^-decay)
    eps            (eps1, eps2): added to g²; the least RMS(p) that relative_step scales by
    clip           largest root mean square of U (the paper's d); None: no clipping
    weight_decay   decoupled
    momentum       beta1; 0 (the default) stores nothing
    momentum_bits  32, 16, 8 or 4 bits per number for it (see optim/momentum.py)
    relative_step  the paper's own step size
    {COMMON_HELP}
    State of a matrix (n, m): row_mean_square (n, 1) and column_mean_square (1, m), float32, and the
    momentum if there is one; of a vector: mean_square.
    Raises UserError for hyperparameters without meaning and for sparse gradients.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-3,
        beta2=0.999,
        eps=(1e-30, 1e-3),
        weight_decay=0.0,
        *,
        decay=0.8,
        clip=1.0,
        factored=True,
        momentum=0.0,
        momentum_bits=32,
        relative_step=False,
        **common,
    ):
        defaults = dict(
            lr=lr,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decay=decay,
            clip=clip,
            factored=factored,
            momentum=momentum,
            momentum_bits=momentum_bits,
            relative_step=relative_step,
        )
        super().__init__(params, defaults, **common)

    def check_group(self, group):
        if not isinstance(group["eps"], tuple | list) or len(group["eps"]) != 2:
            raise UserError(f"adafactor's eps must be two numbers, not {group['eps']}")
        eps1, eps2 = group["eps"]
        super().check_group(group | {"eps": eps1, "betas": (group["momentum"], group["beta2"])})
        check_number({"eps[1]": eps2}, "eps[1]", 0)
        check_number(group, "decay", 0)
        if group["clip"] is not None and not group["clip"] > 0:
            raise UserError(f"clip must be positive, or None for no clipping, not {group['clip']}")

    def new_state(self, tensor, group, shards=None):
        wide = dict(dtype=compute_dtype(tensor), device=tensor.device)
        if tensor.ndim < 2 or not group["factored"]:
            state = {"mean_square": zeros_as(tensor, wide["dtype"])}
        else:
            columns = math.prod(tensor.shape[1:])
            state = {
                "row_mean_square": torch.zeros(tensor.shape[0], 1, **wide),
                "column_mean_square": torch.zeros(1, columns, **wide),
            }
        if group["momentum"] > 0:
            state |= new_momentum(tensor, group["momentum_bits"] if tensor.ndim > 1 else 32)
        return state

    def spans_rows(self, name, tensor, group, shards):
        return name == "column_mean_square"

    def needs_ranks(self, tensor, group, shards):
        factored = tensor.ndim > 1 and group["factored"]
        clips = group["clip"] is not None or group["relative_step"]
        return factored or clips or super().needs_ranks(tensor, group, shards)

    def schedule(self, group, step):
        keep = min(group["beta2"], 1 - step ** -group["decay"])
        return 1 - keep, min(1e-2, step**-0.5)

    def update(self, items):
        super().update(self.kept.kernels.run(items, is_factored, self.launch))

    def launch(self, stack):
        stack.adafactor(self.schedule(stack.group, stack.step)[0])

    def direction(self, batch):
        group, state, shards = batch.group, batch.state, batch.shards
        fresh, relative_rate = batch.schedule
        eps1, eps2 = group["eps"]
        grad, scale = batch.grad, None
        shape = grad.shape
        if "mean_square" in state:
            second = state["mean_square"]
            average_into(second, grad.square(), fresh, eps1)
            update = grad / second.sqrt()
            if group["clip"] is not None:
                update = yield from clip_update(update, group["clip"], shards)
        else:
            batch.grad = None  # a float32 copy, as may be: it is let go of while others are asked
            grads = [grad.flatten(2)]  # (N, n, m)
            del grad
            update, scale = yield from factored_update(
                grads, state, fresh, eps1, group["clip"], shards
            )
        if group["momentum"] > 0:
            update = update if scale is None else update * scale
            update, scale = update.view(shape), None
            update = update_momentum(state, update, group["momentum"], batch.step, batch.generator)
        if group["relative_step"]:
            params = torch.stack([p.to(update.dtype) for p in batch.params])
            params = params.flatten(2) if params.ndim > 2 else params.view(len(params), -1, 1)
            rms = (yield from whole_mean_square(params, (1, 2), shards)).sqrt_()
            rms = rms.clamp_min_(eps2).mul_(relative_rate)
            rms = rms.view(-1, *[1] * (update.ndim - 1))
            scale = rms if scale is None else scale * rms
        return update, scale


def is_factored(item):
    """Is this what the kernels know: a factored matrix at the caller's own learning rate?"""
    return "row_mean_square" in item.state and not item.group["relative_step"]


def factored_update(grads, state, fresh, eps1, clip, shards=None):
    """U = g / sqrt(R Cᵀ / mean(R)), clipped, as (g scaled by columns, a scale per row).

    grads: a list of g alone, (N, n, m), which is emptied -> (N, n, m), (N, n, 1). To be driven:
    sharded/exchange.py.
    """
    grad = grads.pop()
    row, column = state["row_mean_square"], state["column_mean_square"]  # (N, n, 1), (N, 1, m)
    rows = shards.rows if shards else grad.shape[1]
    by_row, by_column = row_and_column_sums(grad)
    by_column = yield by_column
    average_into(row, by_row.div_(grad.shape[2]), fresh, eps1)
    average_into(column, by_column.div_(rows), fresh, eps1)
    mean = (yield row.sum(1, keepdim=True)) / rows
    update, scale = grad * column.rsqrt(), (row / mean).rsqrt_()
    del grad
    if clip is not None:
        squares = mean_square(update, (2,)) * scale.square()
        rms = ((yield squares.sum(1, keepdim=True)) / rows).sqrt_()
        scale = scale / (rms / clip).clamp_min_(1)
    return update, scale


def row_and_column_sums(grad):
    """Sums of g² over each row (N, n, 1) and over each column (N, 1, m) of grad (N, n, m)."""
    if grad.is_cuda:  # reductions square on the way: no copy
        norms = [torch.linalg.vector_norm(grad, dim=d, keepdim=True) for d in (2, 1)]
        return [norm.square_() for norm in norms]
    by_row, by_column = [], 0
    tile = max(1, CACHED // max(1, grad.shape[0] * grad.shape[2]))  # rows that stay in cache
    for rows in grad.split(tile, dim=1):
        squares = rows.square()
        by_row.append(squares.sum(2, keepdim=True))
        by_column = squares.sum(1, keepdim=True) + by_column
    return torch.cat(by_row, dim=1), by_column


def average_into(mean, square, fresh, eps1):
    """mean <- (1 - fresh) * mean + fresh * (square + eps1), in place; writes to both."""
    square = square.add_(eps1).clamp_(max=HUGEST)
    mean.add_(square.sub_(mean).mul_(fresh))
