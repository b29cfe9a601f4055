"""data_order=once: every block of the training text is read once, in an order the seed decides.

Random windows read some tokens several times and others never; comparisons of optimizers in one
pass want neither. Blocks are shuffled in groups of a million tokens or so, group after group: what
a run reads depends on neither the length of the text nor the run's own, so that a short run is the
beginning of a long one and a resumed one goes on exactly. The text itself should be in no order.
"""

import numpy as np
import torch

from leangpt.system.errors import UserError
from leangpt.text.dataset import to_device

GROUP = 1024  # blocks that are shuffled together


class OnePass:
    """The blocks of T tokens of a dataset's training split, shuffled, each read once."""

    def __init__(self, dataset, batch_size, block_size, micro_batches, seed):
        """micro_batches: how many an iteration has."""
        self.tokens = dataset.train
        self.batch_size, self.block_size = batch_size, block_size
        self.micro_batches = micro_batches
        count = dataset.block_count("train", block_size)
        self.stride = dataset.row_tokens or block_size
        generator = torch.Generator().manual_seed(seed)
        groups = [
            first + torch.randperm(GROUP, generator=generator) for first in range(0, count, GROUP)
        ]
        order = torch.cat(groups or [torch.zeros(0, dtype=torch.int64)])
        self.order = order[order < count].numpy()

    def batch(self, iteration, index=0, device="cpu"):
        """An iteration's micro-batch number `index`: x, y (B, T) int64 on `device`."""
        first = (iteration * self.micro_batches + index) * self.batch_size
        starts = self.order[first : first + self.batch_size, None] * self.stride
        return to_device(self.tokens[starts + np.arange(self.block_size + 1)], device)


def one_pass(settings, dataset):
    """The OnePass of a run with data_order=once, None for random windows. Raises UserError where
    there are fewer blocks than the run would read."""
    if settings.data_order == "random":
        return None
    if settings.data_order != "once":
        raise UserError(f"unknown data_order {settings.data_order!r}; use random or once")
    micro_batches = settings.gradient_accumulation_steps
    blocks = OnePass(
        dataset, settings.batch_size, settings.block_size, micro_batches, settings.seed
    )
    wanted = settings.max_iters * micro_batches * settings.batch_size
    if wanted > len(blocks.order):
        raise UserError(
            f"data_order=once: {settings.max_iters} iterations read {wanted:,} blocks "
            f"of {settings.block_size} tokens, {dataset.name} has "
            f"{len(blocks.order):,}: lower max_iters or prepare more text"
        )
    return blocks
