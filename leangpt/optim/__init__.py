"""Optimizers that keep one byte or less per parameter, for any nn.Module.

    from leangpt.optim import build_optimizer, optimizer_table

    optimizer = build_optimizer(model, "muonsn8")
    print(optimizer_table(model, optimizer))

Each class also works alone, on any parameters, as a drop-in torch.optim.Optimizer.
"""

from leangpt.optim.accounting import optimizer_table, planned_bytes, state_bytes
from leangpt.optim.adafactor import Adafactor
from leangpt.optim.adamsn import AdamSN
from leangpt.optim.backward.fused_backward import fuse_into_backward, updates_inside_backward
from leangpt.optim.backward.gradient_sums import sum_in_bits
from leangpt.optim.backward.taken import GradientNotFinite, check_gradients, frees_gradients
from leangpt.optim.build import build_optimizer
from leangpt.optim.muonsn import MuonSN
from leangpt.optim.variants import VARIANTS, Variant

__all__ = [
    "VARIANTS",
    "Adafactor",
    "AdamSN",
    "GradientNotFinite",
    "MuonSN",
    "Variant",
    "build_optimizer",
    "check_gradients",
    "frees_gradients",
    "fuse_into_backward",
    "optimizer_table",
    "planned_bytes",
    "state_bytes",
    "sum_in_bits",
    "updates_inside_backward",
]
