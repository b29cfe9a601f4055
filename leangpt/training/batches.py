"""Which tokens an iteration sees: a function of (seed, iteration), whatever ran before."""

import torch

from leangpt.system.runtime import DATA_STREAM, iteration_seed


def iteration_batches(dataset, settings, runtime, iteration):
    """This process's share of an iteration's batch: pairs of x, y (B, T) int64 on its device.

    Every process draws all of it, in order, from a generator seeded for the iteration, and keeps
    each world_size-th: neither a resume nor the number of processes changes the data.
    settings: seed, gradient_accumulation_steps, batch_size and block_size count.
    """
    generator = torch.Generator().manual_seed(iteration_seed(settings.seed, iteration, DATA_STREAM))
    for index in range(settings.gradient_accumulation_steps):
        mine = index % runtime.world_size == runtime.rank
        device = runtime.device if mine else "cpu"
        batch = dataset.batch("train", settings.batch_size, settings.block_size, generator, device)
        if mine:
            yield batch
