"""Optimizers that keep one byte or less per parameter, for any nn.Module.

    from leangpt.optim import build_optimizer, optimizer_table

    optimizer = build_optimizer(model, "muonsn8")
    print(optimizer_table(model, optimizer))

Each class also works alone, on any parameters, as a drop-in torch.optim.Optimizer.
"""

from leangpt.optim.accounting import optimizer_table, planned_bytes, state_bytes
from leangpt.optim.adafactor import Adafactor
from leangpt.optim.adamsn import AdamSN
from leangpt.optim.build import build_optimizer
from leangpt.optim.fused_backward import fuse_into_backward, updates_inside_backward
from leangpt.optim.muonsn import MuonSN
from leangpt.optim.variants import VARIANTS, Variant

__all__ = [
    "VARIANTS",
    "Adafactor",
    "AdamSN",
    "MuonSN",
    "Variant",
    "build_optimizer",
    "fuse_into_backward",
    "optimizer_table",
    "planned_bytes",
    "state_bytes",
    "updates_inside_backward",
]
