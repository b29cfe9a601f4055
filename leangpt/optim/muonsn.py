"""MuonSN: Subset-Norm on an orthogonalised momentum. The flagship of the family.

For a matrix gradient G (n, m), rows counted as i, columns as j:

    M <- mu M + (1 - mu) G                      momentum
    X  = (1 - nu) G + nu M                      look-ahead
    X_j = X_j / |X_j|                           every input's column made as long as the others
    O  = U Vᵀ of X = U S Vᵀ                     five Newton-Schulz iterations
    v_i <- b v_i + (1 - b) mean_j O_ij²         one second moment per output row
    O_i <- O_i / (sqrt(v_i / (1 - b^t)) + eps)
    W  <- (1 - lr wd) W - lr * 0.2 O / RMS(O)   the size of AdamW's update

What is whose:

    Muon       Jordan et al. 2024, kellerjordan.github.io/posts/muon: the momentum orthogonalised,
               the quintic iteration; embeddings, heads and vectors left to Adam; a convolution as
               the matrix out x (in * kernel)
    NorMuon    Li et al. 2025, arXiv 2510.05491: v, Subset-Norm (arXiv 2411.07120) with rows as the
               subsets, after orthogonalising; what Muon alone lacks is that rows move evenly
    Moonlight  Liu et al. 2025, arXiv 2502.16982, 2.2: the factor 0.2, so that AdamW's learning
               rates and weight decay carry over
    QHM        Ma & Yarats, arXiv 1810.06801: nu apart from mu. nu = mu is Nesterov's look-ahead (in
               Muon), nu = 1 plain momentum
    here       columns of equal length before the iteration (column_norm), so that inputs with small
               gradients are learnt as fast as others; M in 8 or 4 bits (optim/momentum.py), or none
               at all; q, k and v, stacked in one weight, orthogonalised apart (row_blocks)

State: M in 32, 16, 8 or 4 bits, or none (momentum = 0); and v, n numbers. What is not a matrix of a
linear layer belongs in a group with orthogonalize=False, where AdamSN (optim/adamsn.py) moves it.
"""

from collections.abc import Iterable

import torch

from leangpt.optim.adamsn import AdamSN
from leangpt.optim.arithmetic import compute_dtype, mean_square
from leangpt.optim.base import COMMON_HELP, MemoryOptimizer, check_number
from leangpt.optim.batches import STACK_EACH, update_in_batches, update_run
from leangpt.optim.kernels import step_cuda
from leangpt.optim.momentum import new_momentum, update_momentum
from leangpt.optim.sharded.exchange import Whole, run_whole
from leangpt.system.errors import UserError
from leangpt.system.processor import fast_bfloat16

# Jordan's quintic: takes singular values in (0, 1] to about [0.7, 1.2] in five steps.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROWS_AT_ONCE = 64  # of column_norms on CUDA
BFLOAT16_SIDE = 64  # on the CPU smaller matrices are no faster in bfloat16


class MuonSN(AdamSN):
    __doc__ = f"""MuonSN, a drop-in `torch.optim.Optimizer`; every option can be set per group.

    params         parameters or groups
    lr             learning rate on AdamW's scale: one update has root mean square 0.2 lr
    momentum       mu; 0 stores no momentum
    nu             weight of the momentum in what is orthogonalised, the gradient having the rest
    row_beta2      b, the decay of the row second moments
    ns_steps       Newton-Schulz iterations
    update_rms     root mean square of an update before lr
    column_norm    normalise X's columns before Newton-Schulz; False: X as it is, as in Muon
    orthogonalize  False: this group is AdamSN's, with its betas, partition and norm
    row_blocks     of groups: rows of each matrix stacked in one weight, (q, k, v): orthogonalised
                   apart
    momentum_bits, betas, eps, weight_decay, nu1, partition, norm: as AdamSN's. Vectors are always
                   plain Adam.
    {COMMON_HELP}
    State of a matrix (n, m): momentum, as AdamSN's, and row_mean_square (n, 1) float32.
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
        momentum=0.95,
        nu=0.8,
        row_beta2=0.95,
        ns_steps=5,
        update_rms=0.2,
        column_norm=True,
        orthogonalize=True,
        nu1=1.0,
        partition="element",
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
            momentum=momentum,
            nu=nu,
            row_beta2=row_beta2,
            ns_steps=ns_steps,
            update_rms=update_rms,
            column_norm=column_norm,
            orthogonalize=orthogonalize,
            nu1=nu1,
            partition=partition,
            norm=norm,
            momentum_bits=momentum_bits,
            row_blocks=row_blocks,
        )
        MemoryOptimizer.__init__(self, params, defaults, **common)

    def check_group(self, group):
        super().check_group(group)
        for name in ("momentum", "row_beta2"):
            if not 0 <= group[name] < 1:
                raise UserError(f"{name} must lie in [0, 1), not {group[name]}")
        if not 0 <= group["nu"] <= 1:
            raise UserError(f"nu must lie in [0, 1], not {group['nu']}")
        check_number(group, "update_rms", 0)
        if not (isinstance(group["ns_steps"], int) and group["ns_steps"] >= 1):
            raise UserError(f"ns_steps must be a positive int, not {group['ns_steps']!r}")

    def new_state(self, tensor, group, shards=None):
        if not is_orthogonalized(tensor, group):
            return super().new_state(tensor, group, shards)
        wide = dict(dtype=compute_dtype(tensor), device=tensor.device)
        state = {"row_mean_square": torch.zeros(tensor.shape[0], 1, **wide)}
        if group["momentum"] > 0:
            state |= new_momentum(tensor, group["momentum_bits"])
        return state

    def spans_rows(self, name, tensor, group, shards):
        if is_orthogonalized(tensor, group):
            return False
        return super().spans_rows(name, tensor, group, shards)

    def needs_ranks(self, tensor, group, shards):
        return is_orthogonalized(tensor, group) or super().needs_ranks(tensor, group, shards)

    def update(self, items):
        matrices = [i for i in items if is_orthogonalized(i.param, i.group)]
        matrices = self.kept.kernels.run(
            matrices, lambda item: True, self.launch_matrices, [step_cuda], step_cuda.MOST
        )
        here = [i for i in matrices if not i.shards]
        # one bmm for few: it takes five such stacks, and those that stay in a cache are faster
        update_in_batches(self, here, together=STACK_EACH)
        if spread := [i for i in matrices if i.shards]:
            run_whole(spread, lambda item: update_run(self, [item]), self.kept.loads)
        super().update([i for i in items if not is_orthogonalized(i.param, i.group)])

    def launch_matrices(self, stack):
        correction = self.schedule(stack.group, stack.step)[3]
        stack.muonsn(correction, orthogonalize_blocks)

    def schedule(self, group, step):
        return *super().schedule(group, step), 1 - group["row_beta2"] ** step

    def direction(self, batch):
        group, grad, shards = batch.group, batch.grad, batch.shards
        if "row_mean_square" not in batch.state:
            return (yield from super().direction(batch))
        mu = group["momentum"]
        momentum = update_momentum(batch.state, grad, mu, batch.step, batch.generator)
        ahead = grad.lerp(momentum, group["nu"]) if mu > 0 else momentum
        rows = shards.rows if shards else grad.shape[1]
        ahead = Whole(ahead.flatten(2), orthogonalize_blocks, group)  # (N, n, m), of all ranks
        del grad, momentum  # float32 copies, as may be, while the rows travel
        batch.grad = None
        update = yield ahead
        del ahead
        row_square = mean_square(update, (2,))  # (N, n, 1)
        second = batch.state["row_mean_square"].lerp_(row_square, 1 - group["row_beta2"])
        second = second / batch.schedule[3]
        scale = second.sqrt_().add_(group["eps"]).reciprocal_()  # (N, n, 1)
        total = yield (scale.square() * row_square).sum(1, keepdim=True)  # (N, 1, 1)
        rms = (total / rows).sqrt_().clamp_min_(torch.finfo(total.dtype).tiny ** 0.5)
        return update, scale.mul_(group["update_rms"] / rms)


def is_orthogonalized(tensor, group):
    """Is this weight moved by Newton-Schulz? Vectors never are."""
    return group["orthogonalize"] and tensor.ndim >= 2


def orthogonalize_blocks(matrices, group):
    """Orthogonalise the row blocks of N matrices (N, n, m) apart: q, k, v."""
    blocks, how = group["row_blocks"], (group["ns_steps"], group["column_norm"])
    if blocks is None or sum(blocks) != matrices.shape[1]:
        return orthogonalize(matrices, *how)
    if len(set(blocks)) == 1 and matrices.is_contiguous():  # of all layers in one stack
        shape = matrices.shape
        return orthogonalize(matrices.view(-1, blocks[0], shape[2]), *how).view(shape)
    return torch.cat([orthogonalize(b, *how) for b in matrices.split(list(blocks), dim=1)], dim=1)


def orthogonalize(matrices, steps=5, column_norm=False):
    """The nearest semi-orthogonal matrices, roughly: singular values end in about [0.7, 1.2].

    (N, n, m) -> (N, n, m) in the input's dtype. X <- a X + (b A + c A²) X with A = X Xᵀ (Jordan et
    al. 2024), from X of Frobenius norm 1: as a whole, or with m columns of norm 1/sqrt(m) each
    (column_norm), so that inputs with small gradients are learnt as fast as others. The products
    are bfloat16 on CUDA, and on CPUs with fast ones for float32 input of at least BFLOAT16_SIDE
    rows and columns; elsewhere they keep the input's dtype.
    """
    a, b, c = QUINTIC
    dtype, (n, m) = matrices.dtype, matrices.shape[1:]
    if column_norm:
        norm = column_norms(matrices, ROWS_AT_ONCE if matrices.is_cuda else n) * m**0.5
    else:
        norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = matrices / norm.clamp_min_(torch.finfo(dtype).tiny ** 0.5)
    x = x.mT if n > m else x
    narrow = dtype == torch.float32 and x.shape[1] >= BFLOAT16_SIDE
    if x.is_cuda or x.device.type == "cpu" and narrow and fast_bfloat16():
        x = x.to(torch.bfloat16)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT if n > m else x
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def column_norms(matrices, at_once):
    """(N, n, m) -> (N, 1, m), the norms of columns; at first of so many rows `at_once`.

    A sum of many rows to few columns is split over a GPU's processors, and what PyTorch sets aside
    for their parts is up to eight bytes a number: four times a stack of bfloat16. Of few rows it is
    not split.
    """
    found = matrices
    if matrices.shape[1] % at_once == 0 and matrices.shape[1] > at_once:
        wide = torch.promote_types(matrices.dtype, torch.float32)
        parts = matrices.unflatten(1, (-1, at_once))
        found = torch.linalg.vector_norm(parts, dim=2, dtype=wide)
    return torch.linalg.vector_norm(found, dim=1, keepdim=True).to(matrices.dtype)
