"""The optimizers by name, with the rates and options each was tuned to.

To add one: a class that derives from MemoryOptimizer (optim/base.py), and a Variant here.
"""

from dataclasses import dataclass, field

import torch

from leangpt.optim.adafactor import Adafactor
from leangpt.optim.adamsn import AdamSN
from leangpt.optim.muonsn import MuonSN


@dataclass(frozen=True)
class Variant:
    """A named optimizer with its tuned defaults.

    options: of its class; those named embedding_... are of embeddings, heads and vectors alone.
    """

    description: str
    cls: type
    learning_rate: float  # of linear weights, in a model 128 wide
    embedding_lr: float  # of embeddings, an untied head, norms and biases, likewise
    options: dict = field(default_factory=dict)
    role_rates: dict = field(default_factory=dict)  # role of linear weights -> factor on its rate
    linear_power: float = 1.0  # learning_rate falls as width to this power (optim/rates.py)
    embedding_power: float = 0.0  # and embedding_lr


# Learning rates: the best of the grids in results/optimizer_quality.csv (seed setup: 4 layers, 128
# wide, 2000 iterations) or, where seeds cannot tell them apart, a neighbour of it.
# Rates by role and this momentum were chosen by results/adaptive_search.csv (same setup). An MLP's
# output layer wants a sixteenth of its input layer's rate; AdamW gains 0.006 nats by it, what has
# no second moment per element 0.03.
MLP_RATES = {"mlp_in": 2.0, "mlp_out": 0.125}
# Of linear weights, with a share for the step's own gradient (QHAdam's); elsewhere Adam's.
QUASI_HYPERBOLIC = dict(betas=(0.95, 0.95), nu1=0.8, embedding_beta1=0.9, embedding_nu1=1.0)

VARIANTS = {
    "adam": Variant("AdamW, fused: 8 bytes of state per parameter", torch.optim.AdamW, 4e-3, 4e-3),
    "adamsn": Variant(
        "Adam with one second moment per output row of a linear weight: 4 bytes there, 8 elsewhere",
        AdamSN,
        4e-3,
        1.6e-2,
        QUASI_HYPERBOLIC,
        MLP_RATES,
        embedding_power=1.0,
    ),
    "adamsn8": Variant(
        "adamsn, momentum in 8 bits, a second moment per 32 numbers of embeddings: about 1.1 bytes",
        AdamSN,
        4e-3,
        8e-3,
        dict(momentum_bits=8, embedding_partition=32, **QUASI_HYPERBOLIC),
        MLP_RATES,
    ),
    "adafactor": Variant(
        "row and column means for second moments, no momentum: about 0.01 bytes",
        Adafactor,
        2e-3,
        4e-3,
        dict(decay=1.0),
        MLP_RATES,
    ),
    "muonsn": Variant(
        "orthogonalised momentum with a second moment per row: 4 bytes in linear weights, 8 else",
        MuonSN,
        6e-3,
        1.2e-2,
        dict(betas=(0.5, 0.95)),
        linear_power=0.0,
        embedding_power=1.0,
    ),
    "muonsn8": Variant(
        "muonsn with all momentum in 8 bits: about 1.1 bytes",
        MuonSN,
        6e-3,
        1.2e-2,
        dict(betas=(0.5, 0.95), momentum_bits=8, embedding_partition="row"),
        linear_power=0.0,
        embedding_power=1.0,
    ),
    "muonsn4": Variant(
        "muonsn with all momentum in 4 bits: about 0.6 bytes",
        MuonSN,
        8e-3,
        1.2e-2,
        dict(betas=(0.5, 0.95), momentum=0.9, momentum_bits=4, embedding_partition="row"),
        linear_power=0.0,
        embedding_power=1.0,
    ),
    "muonsn0": Variant(
        "muonsn without momentum: about 0.01 bytes",
        MuonSN,
        1.6e-2,
        1.6e-2,
        dict(momentum=0.0, embedding_partition="row"),
        linear_power=0.0,
        embedding_power=1.0,
    ),
}
