"""Rounding a weight matrix to 4 bits with the least harm.

A row's inputs are cut into groups of 32, 64 or 128; each group has a scale and a zero in bfloat16
and each weight a code 0..15:   w ~ (code - 8) * scale + zero.

Two ways, both better than taking a group's minimum and maximum:
- `fit_groups` needs the weights alone: the clipping range with the least squared error.
- `round_to_inputs`, given typical inputs X of the layer, keeps |X w - X w'|^2 small rather than
  |w - w'|^2. First GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds input after input and lets
  those still to come make up for the error; then coordinate descent (as QuantEase, Behdin et al.
  2023, arXiv 2309.01885) goes over all codes again, scales and zeros by least squares with them.

Least squares lowers |w - w'|^2 without GPTQ too, and yet raised the loss (by 0.0054 against 0.0041
on the character model): it shrinks the weights a little, and nothing then makes up for that.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from leangpt.int4 import rounding_cpu, rounding_triton
from leangpt.int4.rounding_cpu import LANES
from leangpt.system import triton

SHRINK = (1.0, 0.92, 0.84, 0.76, 0.68)  # clipping ranges tried, as parts of the full one
REFITS = 2  # least-squares rounds for each
FITTED_AT_ONCE = 2**20  # weights: bounds the temporaries
GPTQ_AT_ONCE = 2**22  # the same for round_to_inputs, which keeps fewer of them
DAMPING = 0.01  # added to the inputs' second moments, as a part of their mean (GPTQ's)
SWEEPS = 4  # of coordinate descent


def fit_groups(weight, group_size):
    """weight (N, K) -> codes (N, K) uint8, scale and zero (N, K / group_size) bfloat16.

    Of the clipping ranges SHRINK each group takes the one with the least squared error.
    """
    N, K = weight.shape
    step = max(1, FITTED_AT_ONCE // K)
    parts = [_fit(weight[i : i + step].float(), group_size) for i in range(0, N, step)]
    return tuple(torch.cat(part) for part in zip(*parts))


def _fit(weight, group_size, h=None):
    """The same; h (group_size), positive and of sum 1: how much the squared error of each of a
    group's weights counts, which also has scale and zero refitted to the codes by least squares,
    in turns. None: clipping alone, all alike."""
    x = weight.unflatten(-1, (-1, group_size))  # (n, K/group, group)
    refits = 0 if h is None else REFITS
    h = x.new_full((group_size,), 1 / group_size) if h is None else h
    mean_x = (h * x).sum(-1, keepdim=True)
    low, high = x.aminmax(dim=-1, keepdim=True)
    best_error = best = None
    for shrink in SHRINK:
        step = (high - low) * (shrink / 15)
        # codes 0..15 lie around 7.5, not around 8: hence half a step
        scale, zero = _storable(step, (low + high) * (shrink / 2) + step / 2)
        codes = _codes(x, scale, zero)
        for _ in range(refits):  # regress x on its codes
            mean_c = (h * codes).sum(-1, keepdim=True)
            centred = h * (codes - mean_c)
            slope = (centred * x).sum(-1, keepdim=True) / (centred * codes).sum(-1, keepdim=True)
            slope = torch.where(slope > 0, slope, scale)  # not where all codes are equal (0 / 0)
            scale, zero = _storable(slope, mean_x - slope * mean_c)
            codes = _codes(x, scale, zero)
        error = (h * (codes * scale + zero - x).square()).sum(-1, keepdim=True)
        if best is None:
            best_error, best = error, (codes, scale, zero)
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = tuple(
                torch.where(better, new, old) for new, old in zip((codes, scale, zero), best)
            )
    codes, scale, zero = best
    return (
        (codes + 8).flatten(1).to(torch.uint8),
        scale.squeeze(-1).bfloat16(),
        zero.squeeze(-1).bfloat16(),
    )


def _storable(scale, zero):
    """What a bfloat16 will hold of them, in float32."""
    return scale.clamp(min=1e-8).bfloat16().float(), zero.bfloat16().float()


def _codes(x, scale, zero):
    return ((x - zero) / scale).round_().clamp_(-8, 7)


@contextmanager
def exact_products():
    """float32 products in float32, though a run allows CUDA TF32: rounding adds up their errors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@exact_products()
def round_to_inputs(weight, group_size, inputs):
    """As fit_groups, for a layer whose typical inputs are inputs (..., K)."""
    N, K = weight.shape
    x = inputs.reshape(-1, K).float()
    gram = (x.T @ x / len(x)).double()  # (K, K)
    importance = gram.diagonal().float()
    # damping: inputs that are never or always alike leave the Gram matrix singular
    gram.diagonal().add_(DAMPING * gram.diagonal().mean() + 1e-12)
    # gram^-1 = spread^T spread; its row j says how the inputs after j make up for j's error
    factor = torch.linalg.cholesky(gram.flip(0, 1)).float()
    identity = torch.eye(K, device=x.device)
    spread = torch.linalg.solve_triangular(factor, identity, upper=False).flip(0, 1).contiguous()
    gram, step, parts = gram.float(), max(LANES, GPTQ_AT_ONCE // K // LANES * LANES), []
    steps = steps_for(weight.device)
    for i in range(0, N, step):
        rows = weight[i : i + step]
        target = F.pad(rows.float(), (0, 0, 0, -len(rows) % LANES)).T.contiguous()  # (K, n)
        codes, scale, zero = _start(target, group_size, importance, spread, gram, steps)
        _descend(target, codes, scale, zero, gram, steps)
        codes, scale, zero = (found[:, : len(rows)].T for found in (codes, scale, zero))
        parts.append(((codes + 8).to(torch.uint8), scale.bfloat16(), zero.bfloat16()))
    return tuple(torch.cat(part) for part in zip(*parts))


def steps_for(device):
    """fit, compensate and descend, each for one group of inputs: by kernels where that can be."""
    if device.type == "cuda" and triton.AVAILABLE:
        return rounding_triton
    return rounding_cpu if device.type == "cpu" and rounding_cpu.library() else PLAIN


def _start(target, group_size, importance, spread, gram, steps):
    """The better of GPTQ and rounding to nearest, row by row: where the weights lie on 4-bit grids
    already, as those of GGUF files do, nothing is lost by the latter, and much by the former."""
    *gptq, error = _gptq(target, group_size, importance, spread, steps)
    *nearest, lost = _nearest(target, group_size, importance, steps)
    better = (lost * (gram @ lost)).sum(0) < error
    return [torch.where(better, b, a) for a, b in zip(gptq, nearest)]


def _weights_of_errors(importance):
    """importance (group,) -> the same, positive, of sum 1."""
    h = importance + 1e-8 * importance.max() + 1e-20
    return h / h.sum()


def _gptq(target, group_size, importance, spread, steps):
    """GPTQ (its algorithm 1): target (K, n) -> codes (K, n), scale and zero (K/group, n), and
    e^T gram e (n), e = target - rounded."""
    codes, errors, found = torch.empty_like(target), torch.empty_like(target), []
    for start in range(0, len(target), group_size):
        at = slice(start, start + group_size)
        block = target[at] - spread[:start, at].T @ errors[:start]
        scale, zero = steps.fit(block, _weights_of_errors(importance[at]), SHRINK, REFITS)
        steps.compensate(block, spread[at, at].contiguous(), scale, zero, codes[at], errors[at])
        found.append((scale, zero))
    scale, zero = (torch.stack(each) for each in zip(*found))
    return codes, scale, zero, errors.square().sum(0)


def _nearest(target, group_size, importance, steps):
    """Each weight to the nearest code, scales for `importance`: as _gptq, but e last."""
    codes, lost, found = torch.empty_like(target), torch.empty_like(target), []
    for start in range(0, len(target), group_size):
        at = slice(start, start + group_size)
        scale, zero = steps.fit(target[at], _weights_of_errors(importance[at]), SHRINK, REFITS)
        codes[at] = _codes(target[at], scale, zero)
        lost[at] = target[at] - (codes[at] * scale + zero)
        found.append((scale, zero))
    scale, zero = (torch.stack(each) for each in zip(*found))
    return codes, scale, zero, lost


def _descend(target, codes, scale, zero, gram, steps):
    """SWEEPS over all groups, in place, each step lowering e^T gram e, e = target - rounded.

    A group's scale and zero are fitted to its codes by least squares, then its codes one by one.
    """
    group = len(target) // len(scale)
    lost = target - codes * scale.repeat_interleave(group, 0) - zero.repeat_interleave(group, 0)
    for g in [*range(len(scale))] * SWEEPS:
        at = slice(g * group, (g + 1) * group)
        pull = gram[at] @ lost  # (group, n): half the slope of the error, downwards
        steps.descend(gram[at, at].contiguous(), pull, lost[at], codes[at], scale[g], zero[g])


# The three steps, as PyTorch operators; what they take and give: int4/rounding_cpu.py


def _fit_step(block, importance, shrink, refits):
    assert (shrink, refits) == (SHRINK, REFITS)
    _, scale, zero = _fit(block.T.contiguous(), len(block), importance)
    return scale[:, 0].float(), zero[:, 0].float()


def _compensate_step(block, spread, scale, zero, codes, errors):
    for j, row in enumerate(spread):
        codes[j] = _codes(block[j], scale, zero)
        errors[j] = (block[j] - (codes[j] * scale + zero)) / row[j]
        block[j:].addr_(row[j:], errors[j], alpha=-1)


def _descend_step(own, pull, lost, codes, scale, zero):
    # normal equations of a change of scale and zero
    before = codes * scale + zero
    cc, c1, one = (codes * (own @ codes)).sum(0), own.sum(0) @ codes, own.sum()
    rc, r1 = (codes * pull).sum(0), pull.sum(0)
    determinant = cc * one - c1 * c1
    new_scale, new_zero = _storable(
        scale + (one * rc - c1 * r1) / determinant, zero + (cc * r1 - c1 * rc) / determinant
    )
    change = codes * (new_scale - scale) + (new_zero - zero)
    pulled = own @ change
    better = (change * (pulled - 2 * pull)).sum(0) < 0  # never where determinant is 0
    scale.copy_(torch.where(better, new_scale, scale))
    zero.copy_(torch.where(better, new_zero, zero))
    pull -= torch.where(better, pulled, 0)
    now = codes * scale + zero
    for j, row in enumerate(own):
        codes[j] = _codes(now[j] + pull[j] / row[j], scale, zero)
        pull.addr_(row, codes[j] * scale + zero - now[j], alpha=-1)
    lost -= codes * scale + zero - before


PLAIN = SimpleNamespace(fit=_fit_step, compensate=_compensate_step, descend=_descend_step)
