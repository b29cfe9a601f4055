"""Which tokens an iteration sees: a function of (seed, iteration), whatever ran before."""

import torch

from leangpt.system.runtime import DATA_STREAM, iteration_seed


def iteration_batches(dataset, settings, runtime, iteration, one_pass=None):
    """This process's share of an iteration's batch: pairs of x, y (B, T) int64 on its device.

    Every process draws all of it, in order, from a generator seeded for the iteration, and keeps
    each world_size-th: neither a resume nor the number of processes changes the data.
    one_pass: the OnePass of a run with data_order=once. settings: seed,
    gradient_accumulation_steps, batch_size and block_size count.
    """
    generator = torch.Generator().manual_seed(iteration_seed(settings.seed, iteration, DATA_STREAM))
    for index in range(settings.gradient_accumulation_steps):
        mine = index % runtime.world_size == runtime.rank
        device = runtime.device if mine else "cpu"
        if one_pass is not None:
            batch = one_pass.batch(iteration, index, device)
        else:
            shape = settings.batch_size, settings.block_size
            batch = dataset.batch("train", *shape, generator, device)
        if mine:
            yield batch
