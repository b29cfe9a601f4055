"""A bench for ideas about AdamSN and Adafactor: many recipes side by side, on one GPU.

Frozen: eb9867c made its CSV; see the folder's docstring.

    python -m experiments.search.adaptive_search --recipes=4 --seeds=16 --first_seed=41

All are one update with switches: a momentum of the gradient (Adam) or of the update (Adafactor)
over the root of second moments a row, an element, or factored; then clips and norms. What won,
rates by role and a quasi-hyperbolic momentum, is in leangpt/optim/adamsn.py and optimizers.py, and
is judged by optimizer_quality.py; this file only tells where to look.

Writes results/adaptive_search.csv: one row a recipe and seed. A recipe's name says all in which
it differs from its family (adaptive_recipes.py).
"""

from dataclasses import dataclass

import torch

from configurator import parse_config
from experiments.search.adaptive_recipes import recipes_named
from experiments.search.recipe_bench import Settings, search
from experiments.shared.common import RESULTS
from leangpt.system.errors import exit_cleanly

TINY = 1e-20


@dataclass(frozen=True)
class Moments:
    """How the weights of one kind are updated: by default as Adafactor's."""

    second: str = "factor"  # factor | row | element | run (of 32)
    momentum: float = 0.0
    bits: int = 32  # of the momentum: 32, 8, 4 or 2
    of: str = "update"  # the momentum is of the update, or of the gradient
    nu: float = 1.0  # weight of the momentum; the rest is what it is a momentum of
    beta2: float = 0.99
    decay: float = 1.0  # beta2 is at most 1 - t^-decay; 0: Adam's bias correction
    now: str = ""  # divide by the RMS of this step's: col | row | colrow | rowcol
    soft: float = 0.0  # u / sqrt(1 + (u / soft)²)
    clip: str = "rms"  # rms | none | row | unit (to RMS 1, up or down) | rowunit
    clip_at: float = 1.0
    power: float = 1.0  # of the root of the second moment
    late: str = ""  # as now, but of what the momentum makes of it; times 0.2
    center: str = ""  # subtract the mean of each row | col from the gradient


class Weights:
    """All weights of one shape and treatment, of a slice of replicas: (N, m, *shape).

    members: [(role, weight, gradient), ...] N of them; rate: of all, before the roles' factors.
    """

    def __init__(self, moments, members, rate, decay, factors, momentum_roles):
        self.moments, self.rate, self.decay = moments, rate, decay
        self.weights = [weight for _, weight, _ in members]
        self.grads = [grad for _, _, grad in members]
        like = torch.stack(self.grads)
        self.momentum = torch.zeros_like(like) if moments.momentum else None
        if moments.second == "element":
            self.second = torch.zeros_like(like)
        elif moments.second == "run":
            self.second = torch.zeros_like(like.unflatten(-1, (-1, 32))[..., :1])
        else:
            self.row = torch.zeros_like(like[..., :1])
            self.column = torch.zeros_like(like[..., :1, :])
        shape = (-1, *[1] * (like.dim() - 1))

        def column(values):
            return torch.tensor(values, device=like.device).view(shape)

        self.factor = column([factors.get(role, 1.0) for role, _, _ in members])
        self.kept = column([float(role in momentum_roles) for role, _, _ in members])

    def step(self, clock):
        """One update; clock: see recipe_bench.py."""
        how = self.moments
        grad = torch.stack(self.grads)
        mu = how.momentum * self.kept
        x = grad
        if how.center:
            x = x - x.mean(-1 if how.center == "row" else -2, keepdim=True)
        if how.momentum and how.of == "gradient":
            x = self._average(x, mu) / (1 - mu**clock.time)
            x = grad + how.nu * (x - grad) if how.nu != 1 else x
        update = x / self._root(grad, clock) ** how.power
        update = clipped(over_rms(update, how.now), how)
        if how.momentum and how.of == "update":
            value = self._average(update, mu)
            update = update + how.nu * (value - update) if how.nu != 1 else value
        if how.late:
            update = over_rms(update, how.late) * 0.2
        rate = self.rate * clock.share * self.factor
        change = -(rate * update) - rate * self.decay * torch.stack(self.weights)
        torch._foreach_add_(self.weights, list(change.unbind(0)))

    def _average(self, x, mu):
        """The new momentum of x, before it is rounded."""
        value = x + mu * (self.momentum - x)
        bits = self.moments.bits
        self.momentum.copy_(value if bits == 32 else dithered(value, bits))
        return value

    def _root(self, grad, clock):
        """The root of the second moment that each element has, its average updated first."""
        how, square = self.moments, grad.square() + 1e-30
        if how.decay:
            fresh = 1 - torch.clamp(1 - clock.time**-how.decay, max=how.beta2)
        else:
            fresh = (1 - how.beta2) / (1 - how.beta2**clock.time)
        if how.second == "element":
            return self.second.lerp_(square, fresh).sqrt()
        if how.second == "run":
            self.second.lerp_(square.unflatten(-1, (-1, 32)).mean(-1, keepdim=True), fresh)
            return self.second.sqrt().expand(*self.second.shape[:-1], 32).reshape(grad.shape)
        root = self.row.lerp_(square.mean(-1, keepdim=True), fresh).sqrt()
        if how.second == "factor":
            self.column.lerp_(square.mean(-2, keepdim=True), fresh)
            root = root * (self.column / self.row.mean(-2, keepdim=True)).sqrt()
        return root


def rms(x, dims):
    return x.square().mean(dims, keepdim=True).sqrt().clamp_min(TINY)


def over_rms(x, what):
    """x divided by the RMS of its columns or rows, or of both in turn."""
    for dim in {"": (), "col": (-2,), "row": (-1,), "colrow": (-2, -1), "rowcol": (-1, -2)}[what]:
        x = x / rms(x, dim)
    return x


def clipped(update, how):
    """The update (N, m, *shape) as `soft` and `clip` say."""
    if how.soft:
        update = update / (1 + (update / how.soft).square()).sqrt()
    size = rms(update, -1 if how.clip.startswith("row") else tuple(range(2, update.dim())))
    if how.clip.endswith("unit"):
        return update / size * how.clip_at
    return update if how.clip == "none" else update / (size / how.clip_at).clamp_min(1)


def dithered(x, bits):
    """x rounded to codes of `bits` bits in blocks of 32, with a dither that is taken off again."""
    blocks = x.unflatten(-1, (-1, 32))
    most = 2 ** (bits - 1)
    size = blocks.abs().amax(-1, keepdim=True).clamp_min(TINY) / most
    v = torch.rand_like(blocks)
    codes = (blocks / size + v).floor().clamp(-most, most - 1)
    return ((codes + 0.5 - v) * size).view(x.shape)


def optimizers(recipe, stack, start, stop):
    """The updates of replicas [start, stop) under one recipe (adaptive_recipes.py)."""
    C, H = stack.config.n_embd, stack.config.n_head
    moments = {kind: Moments(**recipe[kind]) for kind in ("linear", "embedding", "vector")}
    factors = {word[0]: float(word[1:]) for word in recipe["roles"].split()}
    factors["w"] = recipe["wpe_lr"]
    blocks = {}
    for name, weight in stack.weights.items():
        pair = weight.detach()[start:stop], weight.grad[start:stop]
        if "attn.c_attn" in name and recipe["qkv_apart"]:
            parts = [
                (role, *(t[:, i * C : (i + 1) * C] for t in pair)) for i, role in enumerate("qkv")
            ]
        elif ".c_" in name:
            role = "q" if "c_attn" in name else "f" if "c_fc" in name else "p"
            parts = [("o" if "attn.c_proj" in name else role, *pair)]
        elif weight.dim() == 3:
            parts = [("w" if "wpe" in name else "e", *pair)]
        else:
            parts = [("x", *pair)]
        for role, w, g in parts:
            heads = H if role in recipe["per_head"] else 1
            for w_head, g_head in zip(w.chunk(heads, 1), g.chunk(heads, 1)):
                kind = "vector" if role == "x" else "embedding" if role in "we" else "linear"
                blocks.setdefault((kind, w_head.shape), []).append((role, w_head, g_head))
    rates = dict(
        linear=recipe["lr"],
        embedding=recipe["embedding_lr"],
        vector=recipe["vector_lr"] or recipe["embedding_lr"],
    )
    return [
        Weights(
            moments[kind],
            members,
            rates[kind],
            0.0 if kind == "vector" else 0.1,
            factors,
            recipe["momentum_roles"] + "wex",
        )
        for (kind, _), members in blocks.items()
    ]


def main():
    settings, _ = parse_config(Settings)
    search(
        settings,
        recipes_named(settings.recipes or "all"),
        optimizers,
        RESULTS / "adaptive_search.csv",
        lambda recipe: {},
    )


if __name__ == "__main__":
    exit_cleanly(main)
