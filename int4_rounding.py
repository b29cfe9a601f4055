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

import torch

SHRINK = (1.0, 0.92, 0.84, 0.76, 0.68)  # clipping ranges tried, as parts of the full one
REFITS = 2  # least-squares rounds for each
ROWS = 2**20  # weights fitted at a time: bounds the temporaries
GPTQ_ROWS = 2**22  # the same for round_to_inputs, which keeps fewer of them
DAMPING = 0.01  # added to the inputs' second moments, as a part of their mean (GPTQ's)
SWEEPS = 4  # of coordinate descent


def fit_groups(weight, group_size, importance=None):
    """weight (N, K) -> codes (N, K) uint8, scale and zero (N, K / group_size) bfloat16.

    importance (K,): how much a squared error of each input's weight counts, which also has scale
    and zero refitted to the codes by least squares, in turns; None: clipping alone, all alike.
    """
    N, K = weight.shape
    step = max(1, ROWS // K)
    parts = [_fit(weight[i:i + step].float(), group_size, importance) for i in range(0, N, step)]
    return tuple(torch.cat(part) for part in zip(*parts))


def _fit(weight, group_size, importance):
    x = weight.unflatten(-1, (-1, group_size))  # (n, K/group, group)
    h = torch.ones_like(x[:1])
    if importance is not None:
        h = importance.float().view(1, *x.shape[1:]) + 1e-8 * importance.max() + 1e-20
    h = h / h.sum(-1, keepdim=True)
    mean_x = (h * x).sum(-1, keepdim=True)
    low, high = x.aminmax(dim=-1, keepdim=True)
    best_error = best = None
    for shrink in SHRINK:
        step = (high - low) * (shrink / 15)
        # codes 0..15 lie around 7.5, not around 8: hence half a step
        scale, zero = _storable(step, (low + high) * (shrink / 2) + step / 2)
        codes = _codes(x, scale, zero)
        for _ in range(0 if importance is None else REFITS):  # regress x on its codes
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
            best = tuple(torch.where(better, new, old) for new, old in zip((codes, scale, zero),
                                                                           best))
    codes, scale, zero = best
    return ((codes + 8).flatten(1).to(torch.uint8),
            scale.squeeze(-1).bfloat16(), zero.squeeze(-1).bfloat16())


def _storable(scale, zero):
    """What a bfloat16 will hold of them, in float32."""
    return scale.clamp(min=1e-8).bfloat16().float(), zero.bfloat16().float()


def _codes(x, scale, zero):
    return ((x - zero) / scale).round_().clamp_(-8, 7)


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
    spread = torch.linalg.solve_triangular(factor, identity, upper=False).flip(0, 1)
    gram, step, parts = gram.float(), max(1, GPTQ_ROWS // K), []
    for i in range(0, N, step):
        target = weight[i:i + step].T.float().contiguous()  # (K, n): an input's weights together
        codes, scale, zero = _start(target, group_size, importance, spread, gram)
        _descend(target, codes, scale, zero, gram)
        parts.append(((codes + 8).T.to(torch.uint8), scale.T.bfloat16(), zero.T.bfloat16()))
    return tuple(torch.cat(part) for part in zip(*parts))


def _start(target, group_size, importance, spread, gram):
    """The better of GPTQ and rounding to nearest, row by row: where the weights lie on 4-bit grids
    already, as those of GGUF files do, nothing is lost by the latter, and much by the former."""
    gptq = _compensate(target, group_size, importance, spread)
    nearest = fit_groups(target.T.contiguous(), group_size, importance)
    nearest = (nearest[0].T.float() - 8, nearest[1].T.float(), nearest[2].T.float())
    errors = []
    for codes, scale, zero in (gptq, nearest):
        lost = target - _rounded(codes, scale, zero)
        errors.append((lost * (gram @ lost)).sum(0))
    return [torch.where(errors[1] < errors[0], b, a) for a, b in zip(gptq, nearest)]


def _rounded(codes, scale, zero):
    """codes (K, n), scale and zero (K/group, n) -> weights (K, n)."""
    group = len(codes) // len(scale)
    return codes * scale.repeat_interleave(group, 0) + zero.repeat_interleave(group, 0)


def _compensate(target, group_size, importance, spread):
    """GPTQ (its algorithm 1): target (K, n) -> codes (K, n), scale and zero (K/group, n)."""
    w, codes, found = target.clone(), torch.empty_like(target), []
    for start in range(0, len(w), group_size):
        stop = start + group_size
        block = w[start:stop]
        _, scale, zero = fit_groups(block.T.contiguous(), group_size, importance[start:stop])
        scale, zero = scale[:, 0].float(), zero[:, 0].float()
        found.append((scale, zero))
        errors = torch.empty_like(block)
        for j in range(group_size):
            row = spread[start + j, start:stop]
            codes[start + j] = _codes(block[j], scale, zero)
            errors[j] = (block[j] - (codes[start + j] * scale + zero)) / row[j]
            block[j:].addr_(row[j:], errors[j], alpha=-1)
        w[stop:] -= spread[start:stop, stop:].T @ errors
    scale, zero = (torch.stack(each) for each in zip(*found))
    return codes, scale, zero


def _descend(target, codes, scale, zero, gram):
    """SWEEPS over all groups, in place, each step lowering e^T gram e, e = target - rounded.

    A group's scale and zero are fitted to its codes by least squares, then its codes one by one.
    """
    group = len(target) // len(scale)
    pull = gram @ (target - _rounded(codes, scale, zero))  # (K, n): half the slope, downwards
    for g in [*range(len(scale))] * SWEEPS:
        at = slice(g * group, (g + 1) * group)
        own, c, s, z, here = gram[at, at], codes[at], scale[g], zero[g], pull[at].clone()
        before = c * s + z
        # normal equations of a change of scale and zero
        cc, c1, one = (c * (own @ c)).sum(0), own.sum(0) @ c, own.sum()
        rc, r1 = (c * here).sum(0), here.sum(0)
        determinant = cc * one - c1 * c1
        new_s, new_z = _storable(s + (one * rc - c1 * r1) / determinant,
                                 z + (cc * r1 - c1 * rc) / determinant)
        change = c * (new_s - s) + (new_z - z)
        pulled = own @ change
        better = (change * (pulled - 2 * here)).sum(0) < 0  # never where determinant is 0
        s.copy_(torch.where(better, new_s, s))
        z.copy_(torch.where(better, new_z, z))
        here -= torch.where(better, pulled, 0)
        now = c * s + z
        for j in range(group):
            c[j] = _codes(now[j] + here[j] / own[j, j], s, z)
            moved = c[j] * s + z - now[j]
            here.addr_(own[j], moved, alpha=-1)
        pull -= gram[:, at] @ (c * s + z - before)
