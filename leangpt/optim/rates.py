"""Learning rates that follow the width of a model, where a run names none.

Each variant's rates were tuned in a model 128 wide (variants.py); at other widths the best rates of
grids are elsewhere (experiments/results/optimizer_quality.csv: 128, 384 and 512 wide, 0.8M, 10.7M
and 51M parameters; optimizers_124m.csv: 768 wide). One rule is within a factor of two of nearly
all of them (docs/results/optimizers.md has them side by side):

    element-wise updates (Adam's kind)  linear weights 1 / width, embeddings as they are
    orthogonalised updates (Muon's)     linear weights as they are, embeddings 1 / width

The first line is that of muP (Yang & Hu, arXiv 2203.03466, table 8). No rule for batch size or
length of training is known from these grids. Below 128 nothing is scaled up.
"""

from collections import Counter
from dataclasses import dataclass

from leangpt.optim.roles import LINEAR_ROLES

TUNED_WIDTH = 128


@dataclass(frozen=True)
class Rates:
    """Learning rates of a run's groups, before any schedule."""

    linear: float  # of linear weights
    embedding: float  # of embeddings, heads, norms and biases
    role_rates: dict  # role of linear weights -> factor on `linear`
    origin: str  # where they come from, in words


def model_width(placed) -> int:
    """The width of a model: what most linear layers read. TUNED_WIDTH where there are none.

    placed: of roles.place_parameters, (name, parameter, Placement) each.
    """
    reads = Counter(
        p.shape[0 if placement.transposed else 1]
        for _, p, placement in placed
        if placement.role in LINEAR_ROLES and p.ndim == 2
    )
    return reads.most_common(1)[0][0] if reads else TUNED_WIDTH


def own_rates(variant, width) -> Rates:
    """What a Variant starts from in a model of this width."""
    shrink = TUNED_WIDTH / max(width, TUNED_WIDTH)
    linear = variant.learning_rate * shrink**variant.linear_power
    embedding = variant.embedding_lr * shrink**variant.embedding_power
    origin = f"tuned in a model {TUNED_WIDTH} wide"
    if width > TUNED_WIDTH:
        scaled = {"linear weights": variant.linear_power, "the rest": variant.embedding_power}
        names = " and ".join(name for name, power in scaled.items() if power)
        origin += f"; {names} by {TUNED_WIDTH}/{width}"
    return Rates(linear, embedding, variant.role_rates, origin)


def choose_rates(variant, width, learning_rate=None, embedding_lr=None, role_rates=None) -> Rates:
    """The rates of a run: the variant's own, or what was asked for.

    learning_rate alone is for all: embeddings too, whatever their role. With embedding_lr beside it
    the variant's factors by role stay, unless role_rates says otherwise.
    """
    own = own_rates(variant, width)
    if learning_rate is None and embedding_lr is None:
        factors = own.role_rates if role_rates is None else role_rates
        return Rates(own.linear, own.embedding, factors, own.origin)
    instead = f"; its own: {own.linear:.3g} / {own.embedding:.3g}, {own.origin}"
    if embedding_lr is None:
        return Rates(learning_rate, learning_rate, role_rates or {}, "as set, for all" + instead)
    factors = own.role_rates if role_rates is None else role_rates
    linear = own.linear if learning_rate is None else learning_rate
    return Rates(linear, embedding_lr, factors, "as set" + instead)
