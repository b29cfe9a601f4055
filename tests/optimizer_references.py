"""Float64 references of the optimizers, written from the papers with plain loops over subsets; and
steps on gradients that repeat, for the tests that compare with them."""

import torch

from leangpt.optim.muonsn import QUINTIC


def subsets(shape, partition, head_dim=None, row_blocks=None):
    """The partition of an (n, m) weight as a list of boolean masks, one a subset."""
    n, m = shape
    label = torch.arange(n * m).view(n, m)
    rows, columns = label // m, label % m
    if partition == "larger":
        partition = "row" if m > n else "column"
    if partition == "row":
        label = rows
    elif partition == "column":
        block = torch.zeros_like(rows)
        for end in torch.tensor(row_blocks or (n,)).cumsum(0):
            block += (rows >= end).long()
        label = block * m + columns
    elif partition == "head":
        label = rows // head_dim
    elif partition == "head_column":
        label = rows // head_dim * m + columns
    elif isinstance(partition, int):
        label = label // partition
    return [label == s for s in label.unique()]


def adamsn(p, grads, masks, lr, betas, eps, weight_decay, norm, nu1=1.0):
    """arXiv 2411.07120, Algorithm 1 on Adam; nu1: 1810.06801. masks None: one element a subset."""
    beta1, beta2 = betas
    p, m, v = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        square = g**2
        if masks is not None:
            for mask in masks:
                inside = g[mask] ** 2
                square[mask] = inside.sum() if norm == "sum" else inside.mean()
        v = beta2 * v + (1 - beta2) * square
        numerator = (1 - nu1) * g + nu1 * m / (1 - beta1**t)
        step = numerator / ((v / (1 - beta2**t)).sqrt() + eps)
        p = p - lr * weight_decay * p - lr * step
    return p


def adafactor(p, grads, lr, beta2, decay, clip, weight_decay, momentum, relative_step):
    """arXiv 1804.04235, Algorithm 4 (and 5 for vectors), with V materialised."""
    p = p.clone()
    row = column = v = m = 0
    for t, g in enumerate(grads, start=1):
        b = min(beta2, 1 - t**-decay)
        square = g**2 + 1e-30
        if p.ndim == 2:
            row = b * row + (1 - b) * square.mean(1)
            column = b * column + (1 - b) * square.mean(0)
            v = torch.outer(row, column) / row.mean()
        else:
            v = b * v + (1 - b) * square
        u = g / v.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item() / clip)
        m = momentum * m + (1 - momentum) * u
        size = max(1e-3, p.square().mean().sqrt().item()) * min(1e-2, t**-0.5)
        p = p - lr * weight_decay * p - lr * m * (size if relative_step else 1)
    return p


def muonsn(p, grads, blocks, lr, mu, nu, row_beta2, eps, weight_decay, rms=0.2, column_norm=True):
    """Newton-Schulz on each block of rows (a list of (start, end)), then Subset-Norm by rows."""
    a, b, c = QUINTIC
    p, m, v = p.clone(), torch.zeros_like(p), torch.zeros(p.shape[0], 1, dtype=p.dtype)
    for t, g in enumerate(grads, start=1):
        m = mu * m + (1 - mu) * g
        ahead = (1 - nu) * g + nu * m
        o = torch.zeros_like(p)
        for start, end in blocks:
            x = ahead[start:end]
            if column_norm:
                x = x / x.norm(dim=0, keepdim=True).clamp_min(1e-150)
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = a * x + b * gram @ x + c * gram @ gram @ x
            o[start:end] = x
        v = row_beta2 * v + (1 - row_beta2) * o.square().mean(1, keepdim=True)
        o = o / ((v / (1 - row_beta2**t)).sqrt() + eps)
        p = p - lr * weight_decay * p - lr * rms * o / o.square().mean().sqrt()
    return p


# ---------------------------------------------------------------------- steps


LARGE = (1030, 260)  # beyond the size that is stacked: the multi-tensor kernels take it


def gradients(shape, steps=50, seed=0):
    """Gradients of uneven size over rows and columns, as float64."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    return [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)
    ]


def run(optimizer, params, grads):
    """One step for each list of gradients (one gradient a parameter)."""
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.to(p.dtype).to(p.device).clone()
        optimizer.step()


def assert_close(actual, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


def alike(value, other):
    """Are two float32 tensors of state equal but for rounding, nan where the other is?

    To 1e-4 of each number and, as a momentum may be a difference of larger ones, to a few roundings
    (2^-22) of the tensor's largest.
    """
    largest = other[other.isfinite()].abs().max().item() if other.isfinite().any() else 0.0
    return torch.allclose(value, other, rtol=1e-4, atol=2**-22 * largest, equal_nan=True)
