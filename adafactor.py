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

import torch

from errors import UserError
from optimizer_core import (
    COMMON_HELP,
    MemoryOptimizer,
    check_number,
    clip_update,
    compute_dtype,
    mean_square,
)
from quantized_state import new_momentum, update_momentum

HUGEST = 1e30  # gradients beyond 1e15 count as 1e15: R Cᵀ / mean(R) must not overflow to nan


class Adafactor(MemoryOptimizer):
    __doc__ = f"""Adafactor, a drop-in `torch.optim.Optimizer`.

    params         parameters or groups. Matrices are factored (more dimensions are flattened to
                   (n, -1)); vectors keep a second moment an element, as in the paper
    lr             explicit learning rate (float or 0-dim tensor); a factor under relative_step
    beta2, decay   second-moment decay min(beta2, 1 - t^-decay)
    eps            (eps1, eps2): added to g²; the least RMS(p) that relative_step scales by
    clip           largest root mean square of U (the paper's d); None: no clipping
    weight_decay   decoupled
    momentum       beta1; 0 (the default) stores nothing
    momentum_bits  32, 16, 8 or 4 bits a number for it (see quantized_state.py)
    relative_step  the paper's own step size
    {COMMON_HELP}
    Raises UserError for hyperparameters without meaning and for sparse gradients.
    """

    def __init__(
        self, params, lr=1e-3, beta2=0.999, eps=(1e-30, 1e-3), weight_decay=0.0, *, decay=0.8,
        clip=1.0, momentum=0.0, momentum_bits=32, relative_step=False, **common,
    ):  # fmt: skip
        defaults = dict(
            lr=lr, beta2=beta2, eps=tuple(eps), weight_decay=weight_decay, decay=decay, clip=clip,
            momentum=momentum, momentum_bits=momentum_bits, relative_step=relative_step,
        )  # fmt: skip
        super().__init__(params, defaults, **common)

    def check_group(self, group):
        eps1, eps2 = group["eps"]
        super().check_group(group | {"eps": eps1, "betas": (group["momentum"], group["beta2"])})
        check_number({"eps[1]": eps2}, "eps[1]", 0)
        check_number(group, "decay", 0)
        if group["clip"] is not None and not group["clip"] > 0:
            raise UserError(f"clip must be positive, or None for no clipping, not {group['clip']}")

    def new_state(self, tensor, group, shards=None):
        wide = dict(dtype=compute_dtype(tensor), device=tensor.device)
        if tensor.ndim < 2:
            state = {"mean_square": torch.zeros_like(tensor, dtype=wide["dtype"])}
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

    def direction(self, batch):
        group, state, shards = batch.group, batch.state, batch.shards
        keep, most = 1 - batch.step ** -group["decay"], group["beta2"]
        keep = keep.clamp(max=most) if torch.is_tensor(keep) else min(keep, most)  # compiled or not
        eps1, eps2 = group["eps"]
        if "mean_square" in state:
            second = state["mean_square"]
            average_into(second, batch.grad.square(), keep, eps1)
            update = batch.grad / second.sqrt()
        else:
            update = factored_update(batch.grad.flatten(2), state, keep, eps1, shards)
            update = update.view(batch.grad.shape)
        if group["clip"] is not None:
            update = clip_update(update, group["clip"], shards)
        update = update_momentum(state, update, group["momentum"], batch.generator)
        if group["relative_step"]:
            params = torch.stack([p.to(update.dtype) for p in batch.params])
            rms = mean_square(params, tuple(range(1, params.ndim)), shards).sqrt_()
            update = update * rms.clamp_min_(eps2) * min(1e-2, batch.step**-0.5)
        return update


def factored_update(grad, state, keep, eps1, shards=None):
    """g / sqrt(V), V = R Cᵀ / mean(R), without forming V. grad (N, n, m) -> (N, n, m)."""
    row, column = state["row_mean_square"], state["column_mean_square"]  # (N, n, 1), (N, 1, m)
    average_into(row, mean_square(grad, (2,)), keep, eps1)
    average_into(column, mean_square(grad, (1,), shards), keep, eps1)
    mean = row.mean(1, keepdim=True)
    if shards:
        mean = shards.sum(row.sum(1, keepdim=True)) / shards.rows
    return (grad * (row / mean).rsqrt_()).mul_(column.rsqrt())


def average_into(mean, square, keep, eps1):
    """mean <- keep * mean + (1 - keep) * (square + eps1), in place."""
    square = square.add_(eps1).clamp_(max=HUGEST)
    mean.add_(square.sub_(mean).mul_(1 - keep))
