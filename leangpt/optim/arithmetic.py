"""Arithmetic that the optimizers share, on batches of N equally shaped tensors (N, ...)."""

import math

import torch

# Squares beyond this count as this in Adafactor's means: R Cᵀ / mean(R) must not overflow to nan.
HUGEST = 1e30


def zeros_as(tensor, dtype):
    """torch.zeros_like, which on the meta device, where plans are made, would first load all of
    sympy for its symbolic shapes: a third of a second."""
    if tensor.is_meta:
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
    return torch.zeros_like(tensor, dtype=dtype)


def compute_dtype(tensor):
    """float64 stays; everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def stack(tensors):
    """(N, *shape): a view for one tensor, a copy for more."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def shift(param, update, scale, decay, rate):
    """param <- decay * param - rate * scale * update, in as few passes as the device allows.

    update: param's numbers in any shape; scale: None, or broadcasting against update.
    """
    param = param.view(update.shape)
    if scale is None:
        param.mul_(decay).add_(update, alpha=-rate)
    elif param.device.type == "cpu" and param.ndim == 2 and scale.shape == (len(param), 1):
        # row i: (1, 1) @ (1, m); a matrix product takes the decay along in the same pass
        param.unsqueeze(1).baddbmm_(
            scale.unsqueeze(1), update.unsqueeze(1), beta=decay, alpha=-rate
        )
    else:
        param.mul_(decay).addcmul_(update, scale, value=-rate)


def sum_of_squares(x, dims):
    """Sum of x² over `dims`, kept as size 1."""
    if x.is_cuda or dims[-1] == x.ndim - 1:
        return torch.linalg.vector_norm(x, dim=dims, keepdim=True).square_()
    # on the CPU ten times faster than a norm over rows, for a copy's memory
    return x.square().sum(dims, keepdim=True)


def mean_square(x, dims):
    """Mean of x² over `dims`, kept as size 1."""
    return sum_of_squares(x, dims).div_(math.prod([x.shape[d] for d in dims]))


def whole_mean_square(x, dims, shards):
    """The same where dim 1, one of `dims`, is the rows of every rank. To be driven:
    sharded/exchange.py. shards: a RowShards, or None where all rows are here."""
    total = yield sum_of_squares(x, dims)
    rows = shards.rows if shards else x.shape[1]
    return total.div_(math.prod([rows if d == 1 else x.shape[d] for d in dims]))


def clip_update(update, limit, shards=None):
    """Scale each of N updates down to a root mean square of at most `limit` (1804.04235, Alg. 4).

    Out of place: the update may be the momentum itself. To be driven, as whole_mean_square.
    """
    if update.ndim == 1:
        return update.clamp(-limit, limit)
    rms = (yield from whole_mean_square(update, tuple(range(1, update.ndim)), shards)).sqrt_()
    return update / (rms / limit).clamp_min_(1)
