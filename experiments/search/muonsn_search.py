"""A bench for ideas about MuonSN: many recipes side by side at the seed setup, on one GPU.

Frozen: 6ad1d91, 6865f9d, bc699d8 and 57632a3 made its CSV; see the folder's docstring.

    python -m experiments.search.muonsn_search --recipes=all

Here an optimizer is a few lines over stacked replicas, with switches for everything that might
help; forward, backward and all updates are one CUDA graph. What wins is then built into
leangpt/optim/muonsn.py and judged by optimizer_quality.py; this file only tells where to look.
Losses are over the whole validation split, means of `seeds` seeds, at fixed learning rates unless a
recipe names its own.

Writes results/muonsn_search.csv: one row a recipe and seed.
"""

from dataclasses import asdict, dataclass, fields, replace

import torch

from configurator import parse_config
from experiments.search.muonsn_recipes import recipes_named
from experiments.search.recipe_bench import Settings, search
from experiments.shared.common import RESULTS
from leangpt.system.errors import UserError, exit_cleanly

QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5  # Jordan et al. 2024
POLAR = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),  # Polar Express (2505.16932)
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]
CUBIC = [(1.5, -0.5, 0.0)] * 5  # gentle: small singular values stay small
TINY = 1e-20


@dataclass(frozen=True)
class Recipe:
    """One optimizer. The defaults are MuonSN's, without the columns' norms; a role is q, k, v, o,
    f (MLP in) or p (MLP out)."""

    lr: float = 8e-3  # of linear weights
    embedding_lr: float = 8e-3
    vector_lr: float = 0.0  # of norm gains; 0: embedding_lr
    wpe_lr: float = 1.0  # of position embeddings, relative to embedding_lr
    roles: str = ""  # "v2 o0.5": factors on lr
    mu: float = 0.95  # momentum
    mu_end: float = -1.0  # momentum at the last iteration; -1: constant
    mu_warmup: int = 0  # iterations over which momentum rises from 0.85
    nesterov: bool = True
    look: float = -1.0  # weight of the momentum in the look-ahead; -1: mu
    momentum_roles: str = "qkvofp"  # roles that keep a momentum
    mars: float = 0.0  # variance reduction with the previous gradient (2411.10438)
    bits: int = 32  # of the momentum: 32, 8, 4, 2 or 1
    rounding: str = "stochastic"  # stochastic | nearest
    previous_bits: int = 32  # of the previous gradient (mars)
    rank: int = 0  # > 0: the momentum is kept as a product of this rank
    ns: str = "quintic"  # quintic | polar | cubic
    steps: int = 5
    per_head: str = ""  # roles among qkvo orthogonalised head by head
    pre: str = ""  # before it, divide by root second moments: row | column | both; or by the
    # columns' own norms of this step, with no state: now
    post: str = "row"  # after it: row | column | both | element | ""
    post_beta: float = 0.95
    scale: str = "rms"  # rms | spectral (sqrt(max(1, n/m)), the same mean over shapes)
    cautious: bool = False  # drop coordinates whose sign is not the gradient's (2411.16085)
    cautious_decay: bool = False  # decay only where the update shrinks the weight
    weight_decay: float = 0.1
    embedding_decay: float = 0.1
    embedding: str = "element"  # element | row (second moment) | muon
    embedding_beta1: float = 0.9
    embedding_beta2: float = 0.99


def coefficients(recipe):
    """The polynomial of every Newton-Schulz step."""
    if recipe.ns == "polar":  # the safety factor of the paper, off for the last step
        safe = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR[:4]] + POLAR[4:]
        return safe[: recipe.steps]
    table = {"quintic": QUINTIC, "cubic": CUBIC}[recipe.ns]
    return [table[0]] * recipe.steps


def orthogonalize(x, polynomials):
    """Towards U Vᵀ: (N, n, m) -> (N, n, m); bfloat16 products on CUDA."""
    dtype, tall = x.dtype, x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + TINY)
    x = x.to(torch.bfloat16) if x.is_cuda else x
    for a, b, c in polynomials:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(dtype)
    return x.mT if tall else x


def compress(x, bits, rounding="stochastic"):
    """x (..., k) rounded to `bits` bits in blocks of 32 along the last dimension."""
    if bits == 1:  # sign times the block's mean magnitude
        blocks = x.reshape(*x.shape[:-1], -1, 32)
        return (blocks.sign() * blocks.abs().mean(-1, keepdim=True)).view(x.shape)
    levels = 2 ** (bits - 1) - 1
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    size = blocks.abs().amax(-1, keepdim=True).clamp_min(TINY) / levels
    noise = torch.rand_like(blocks) if rounding == "stochastic" else 0.5
    return ((blocks / size + noise).floor() * size).view(x.shape)


class Matrices:
    """All linear blocks of one shape and treatment, of a slice of replicas: (N, m, rows, columns).

    N blocks (layers times roles), m replicas.
    """

    def __init__(self, recipe, members, heads):
        self.recipe, self.heads = recipe, heads
        self.roles = [role for role, _, _ in members]
        self.weights = [weight for _, weight, _ in members]
        self.grads = [grad for _, _, grad in members]
        like = torch.stack(self.grads)
        zeros = torch.zeros_like
        self.momentum, self.previous = zeros(like), zeros(like) if recipe.mars else None
        if recipe.rank:
            start = torch.randn(*like.shape[:2], like.shape[3], recipe.rank, device=like.device)
            self.right = start / start.norm(dim=2, keepdim=True)
        self.row = zeros(like[..., :1])
        self.column = zeros(like[..., :1, :])
        self.post_row, self.post_column = zeros(self.row), zeros(self.column)
        self.element = zeros(like) if recipe.post == "element" else None
        factors = dict.fromkeys("qkvofp", 1.0)
        factors |= {word[0]: float(word[1:]) for word in recipe.roles.split()}
        shape = (-1, 1, 1, 1)
        self.factor = torch.tensor([factors[r] for r in self.roles], device=like.device).view(shape)
        kept = [float(role in recipe.momentum_roles) for role in self.roles]
        self.kept = torch.tensor(kept, device=like.device).view(shape)

    def step(self, clock):
        """One update; clock: see recipe_bench.py."""
        recipe = self.recipe
        grad = torch.stack(self.grads)
        x = self._momentum(grad, clock)
        x = self._divide(x, grad, recipe.pre, self.row, self.column, recipe.embedding_beta2, clock)
        x = self._orthogonal(x)
        if recipe.post == "element":
            self.element.lerp_(x.square(), 1 - recipe.post_beta)
            x = x / (self.element / clock.correction(recipe.post_beta)).sqrt().clamp_min(TINY)
        else:
            x = self._divide(
                x, x, recipe.post, self.post_row, self.post_column, recipe.post_beta, clock
            )
        if recipe.cautious:
            mask = (x * grad > 0).float()
            x = x * mask / mask.mean((2, 3), keepdim=True).clamp_min(1e-3)
        rows, columns = x.shape[2:]
        x = x / (x.square().mean((2, 3), keepdim=True).sqrt() + TINY)
        size = (
            0.2
            if recipe.scale == "rms"
            else 0.2 * max(1, rows / columns) ** 0.5 / max(rows / 128, columns / 128) ** 0.5
        )
        rate = recipe.lr * clock.share * self.factor
        weights = torch.stack(self.weights)
        decay = rate * recipe.weight_decay
        if recipe.cautious_decay:
            decay = decay * (x * weights > 0)
        change = -(rate * size) * x - decay * weights
        torch._foreach_add_(self.weights, list(change.unbind(0)))

    def _momentum(self, grad, clock):
        recipe, mu = self.recipe, momentum_now(self.recipe, clock) * self.kept
        now = grad
        if recipe.mars:
            now = grad + recipe.mars * mu / (1 - mu) * (grad - self.previous)
            few = recipe.previous_bits < 32
            self.previous.copy_(compress(grad, recipe.previous_bits, "nearest") if few else grad)
        value = now + mu * (self.momentum - now)
        if recipe.rank:
            value = self._low_rank(value)
        elif recipe.bits < 32:
            self.momentum.copy_(compress(value, recipe.bits, recipe.rounding))
        else:
            self.momentum.copy_(value)
        ahead = mu if recipe.look < 0 else recipe.look * self.kept
        return now + ahead * (value - now) if recipe.nesterov else value

    def _low_rank(self, value):
        """Keep the best product of `rank` found by one subspace iteration; return what is kept
        plus what this gradient added."""
        flat = value.flatten(0, 1)
        left = orthogonalize(flat @ self.right.flatten(0, 1), QUINTIC)
        left = orthogonalize_exactly(left)
        right = flat.mT @ left
        self.momentum.copy_((left @ right.mT).view(value.shape))
        self.right.copy_((right / (right.norm(dim=1, keepdim=True) + TINY)).view(self.right.shape))
        return value

    def _divide(self, x, source, what, row, column, beta, clock):
        """x over the root of row and/or column second moments of `source`, updated first."""
        if not what:
            return x
        if what == "now":
            return x / x.square().mean(2, keepdim=True).sqrt().clamp_min(TINY)
        square = source.square()
        row.lerp_(square.mean(3, keepdim=True), 1 - beta)
        column.lerp_(square.mean(2, keepdim=True), 1 - beta)
        if what in ("row", "both"):
            x = x / (row / clock.correction(beta)).sqrt().clamp_min(TINY)
        if what in ("column", "both"):
            x = x / (column / clock.correction(beta)).sqrt().clamp_min(TINY)
        return x

    def _orthogonal(self, x):
        flat, polynomials = x.flatten(0, 1), coefficients(self.recipe)
        if self.heads:
            H, by_rows = self.heads
            n, m = flat.shape[1:]
            flat = flat if by_rows else flat.mT
            done = orthogonalize(flat.reshape(-1, flat.shape[1] // H, flat.shape[2]), polynomials)
            done = done.reshape(flat.shape)
            return (done if by_rows else done.mT).reshape(x.shape)
        return orthogonalize(flat, polynomials).reshape(x.shape)


def momentum_now(recipe, clock):
    """mu at this iteration, a () tensor."""
    mu = torch.full_like(clock.time, recipe.mu)
    if recipe.mu_end >= 0:
        mu = mu + (recipe.mu_end - recipe.mu) * clock.time / clock.iterations
    if recipe.mu_warmup:
        mu = torch.lerp(
            torch.full_like(mu, 0.85), mu, (clock.time / recipe.mu_warmup).clamp(max=1.0)
        )
    return mu


def orthogonalize_exactly(x, steps=4):
    """Cubic Newton-Schulz on tall x (N, n, r) with singular values already near 1."""
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x


class Rest:
    """Embeddings and norm gains of a slice of replicas: Adam, or a second moment a row."""

    def __init__(self, recipe, named):
        self.recipe, self.named = recipe, named
        self.first = [torch.zeros_like(grad) for _, _, grad in named]
        self.second = [torch.zeros_like(self._square(name, grad)) for name, _, grad in named]

    def _square(self, name, grad):
        square = grad.square()
        by_row = self.recipe.embedding == "row" and grad.dim() == 3
        return square.mean(2, keepdim=True) if by_row else square

    def step(self, clock):
        """One update of all of them."""
        recipe = self.recipe
        weights = [weight for _, weight, _ in self.named]
        grads = [grad for _, _, grad in self.named]
        b1, b2 = recipe.embedding_beta1, recipe.embedding_beta2
        torch._foreach_lerp_(self.first, grads, 1 - b1)
        squares = [self._square(name, grad) for name, _, grad in self.named]
        torch._foreach_lerp_(self.second, squares, 1 - b2)
        roots = torch._foreach_sqrt(torch._foreach_div(self.second, clock.correction(b2)))
        torch._foreach_add_(roots, 1e-8)
        means = torch._foreach_div(self.first, clock.correction(b1))
        moves = list(torch._foreach_div(means, roots))
        for i, (name, weight, grad) in enumerate(self.named):
            if weight.dim() == 2:  # (m, C): norm gains, not decayed
                moves[i] = moves[i] * ((recipe.vector_lr or recipe.embedding_lr) * clock.share)
                continue
            if recipe.embedding == "muon":
                move = orthogonalize(grad.lerp(self.first[i], b1), QUINTIC)
                moves[i] = 0.2 * move / (move.square().mean((1, 2), keepdim=True).sqrt() + TINY)
            factor = recipe.wpe_lr if "wpe" in name else 1.0
            move = moves[i] + recipe.embedding_decay * weight
            moves[i] = move * (recipe.embedding_lr * factor * clock.share)
        torch._foreach_sub_(weights, moves)


def optimizers(recipe, stack, start, stop):
    """The updates of replicas [start, stop) under one recipe."""
    C, H = stack.config.n_embd, stack.config.n_head
    blocks, rest = {}, []
    for name, weight in stack.weights.items():
        pair = weight.detach()[start:stop], weight.grad[start:stop]
        if "attn.c_attn" in name:
            parts = [
                (role, *(t[:, i * C : (i + 1) * C] for t in pair)) for i, role in enumerate("qkv")
            ]
        elif ".c_" in name:
            role = "o" if "attn" in name else "f" if "c_fc" in name else "p"
            parts = [(role, *pair)]
        else:
            rest.append((name, *pair))
            continue
        for role, w, g in parts:
            heads = (H, role != "o") if role in recipe.per_head else None
            blocks.setdefault((w.shape, heads), []).append((role, w, g))
    return [Matrices(recipe, members, heads) for (_, heads), members in blocks.items()] + [
        Rest(recipe, rest)
    ]


def make(overrides):
    """Recipe from a dict of overrides. Raises UserError for an unknown one."""
    unknown = set(overrides) - {field.name for field in fields(Recipe)}
    if unknown:
        raise UserError(f"a recipe has no {', '.join(sorted(unknown))}")
    return replace(Recipe(), **overrides)


def main():
    settings, _ = parse_config(Settings)
    named = {
        name: make(overrides)
        for name, overrides in recipes_named(settings.recipes or "all").items()
    }
    search(settings, named, optimizers, RESULTS / "muonsn_search.csv", asdict)


if __name__ == "__main__":
    exit_cleanly(main)
