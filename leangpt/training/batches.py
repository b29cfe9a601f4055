"""Which tokens an iteration sees: a function of (seed, iteration), whatever ran before."""

from dataclasses import dataclass

import torch

from leangpt.system.errors import UserError
from leangpt.system.runtime import DATA_STREAM, iteration_seed


@dataclass(frozen=True)
class Share:
    """One process's part of an iteration: whole micro-batches, or some rows of each."""

    count: int  # micro-batches it computes
    stride: int  # it takes every stride-th
    rows: slice  # of each that it takes
    divisor: float  # of a mean loss: the processes' mean of all quotients is the iteration's loss


def share_of(settings, rank=0, world_size=1) -> Share:
    """What process `rank` of `world_size` that read data computes of each iteration.

    Whole micro-batches where their number allows it, else rows of each, as evenly as they come.
    settings: gradient_accumulation_steps and batch_size count. Raises UserError where neither goes.
    """
    micro_batches, B = settings.gradient_accumulation_steps, settings.batch_size
    if micro_batches % world_size == 0:
        count = micro_batches // world_size
        return Share(count, world_size, slice(0, B), count)
    if world_size > B:
        raise UserError(
            f"gradient_accumulation_steps={micro_batches} and batch_size={B} cannot be shared out "
            f"among {world_size} processes: one of them must be {world_size}, or the first a "
            "multiple of it, or the second larger"
        )
    rows = slice(B * rank // world_size, B * (rank + 1) // world_size)
    mine = (rows.stop - rows.start) * world_size
    return Share(micro_batches, 1, rows, micro_batches * B / mine)


def iteration_batches(dataset, settings, runtime, iteration, one_pass=None):
    """This process's share of an iteration's batch: x, y (b, T) int64 on its device, and what to
    divide their mean loss by.

    Every process draws all of it, in order, from a generator seeded for the iteration, and keeps
    what `share_of` says: neither a resume nor the number of processes changes the data.
    one_pass: the OnePass of a run with data_order=once. settings: seed,
    gradient_accumulation_steps, batch_size and block_size count. Every token that has a loss weighs
    the same, however they are spread over micro-batches.
    """
    generator = torch.Generator().manual_seed(iteration_seed(settings.seed, iteration, DATA_STREAM))
    share = share_of(settings, runtime.data_rank, runtime.data_parallel)
    batches = _all_batches(dataset, settings, runtime, generator, share, iteration, one_pass)
    if dataset.row_tokens is None:
        yield from ((x, y, share.divisor) for x, y, _ in batches if x is not None)
        return
    batches = list(batches)
    total = sum(counted for _, _, counted in batches)
    for x, y, _ in batches:
        if x is not None:
            yield x, y, total / (int((y >= 0).sum()) * runtime.data_parallel)


def _all_batches(dataset, settings, runtime, generator, share, iteration, one_pass):
    """x, y of this process's rows, None where it has none, and how many tokens of the whole
    micro-batch have a loss (None where all have)."""
    for index in range(settings.gradient_accumulation_steps):
        mine = share.stride == 1 or index % share.stride == runtime.data_rank
        device = runtime.device if mine else "cpu"
        if one_pass is not None:
            x, y = one_pass.batch(iteration, index, device)
        else:
            shape = settings.batch_size, settings.block_size
            x, y = dataset.batch("train", *shape, generator, device)
        counted = None if dataset.row_tokens is None else int((y >= 0).sum())
        yield (x[share.rows], y[share.rows], counted) if mine else (None, None, counted)
