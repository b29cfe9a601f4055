"""Who is compared at 124M parameters: how train.py is told, and where the search of rates begins.

In the order in which their runs are made. Rates start from a grid of four linear rates by two
embedding rates around what the small models and a sketch at this size suggest.
"""

from dataclasses import dataclass

# 131,072 tokens an iteration. Updates inside backward cannot add gradients up: one micro-batch.
MICRO_BATCHES = ("--batch_size=32", "--gradient_accumulation_steps=4")
ONE_BATCH = ("--batch_size=128", "--gradient_accumulation_steps=1")
LOW_BYTE = ("--param_dtype=bfloat16", "--optimizer_options=fused_backward=True", *ONE_BATCH)

ADAM_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
MUON_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
EMBEDDING_RATES = (1e-3, 4e-3)


@dataclass(frozen=True)
class Entrant:
    """One optimizer of the comparison."""

    variant: str  # of ours, or the name of one in foreign.py
    rates: tuple = ADAM_RATES  # of linear weights, each twice the one before
    embedding_rates: tuple = EMBEDDING_RATES
    flags: tuple = MICRO_BATCHES  # for train.py, beyond those of the protocol
    foreign: bool = False  # is it built by foreign.py?
    package: str | None = None  # that it comes from, beyond torch
    beta2: float = 0.95  # while rates are searched
    weight_decay: float = 0.1  # likewise


ENTRANTS = {
    "adam": Entrant("adam"),
    "muonsn8": Entrant("muonsn8", MUON_RATES),
    "muonsn": Entrant("muonsn", MUON_RATES),
    "adamsn8": Entrant("adamsn8"),
    "adafactor": Entrant("adafactor"),
    "muonsn4": Entrant("muonsn4", MUON_RATES),
    "torch_muon": Entrant("torch_muon", foreign=True),
    "adamsn": Entrant("adamsn"),
    "muonsn8_low_byte": Entrant("muonsn8", MUON_RATES, flags=LOW_BYTE),
    "adamsn8_low_byte": Entrant("adamsn8", flags=LOW_BYTE),
    "muon_8bit": Entrant("muon_8bit", foreign=True),
    "muonsn0": Entrant("muonsn0", (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "torchao_adamw8bit": Entrant("torchao_adamw8bit", foreign=True, package="torchao"),
    "torchao_adamw4bit": Entrant("torchao_adamw4bit", foreign=True, package="torchao"),
    "soap": Entrant("soap", foreign=True, package="pytorch_optimizer"),
}
OTHER_BETA2 = 0.99  # tried at the best rates, after them
OTHER_WEIGHT_DECAY = 0.3
