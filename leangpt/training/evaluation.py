"""The losses a run is judged by: always over the same batches, shared out over the processes.

Training is not disturbed: dropout is off, and no random number that it uses is drawn here.
"""

import math

import torch

from leangpt.system.progress import progress

TRAIN_SAMPLE = 50  # batches that estimate the training loss where eval_iters=0


@torch.no_grad()
def evaluate(model, dataset, settings, runtime, stopping, compiled=None, in_step=False):
    """Mean loss of both splits -> {"train": float, "val": float}, or None if `stopping()` said so.

    Over the whole validation split (eval_iters=0), or a fixed sample. Every token weighs the same,
    whatever the size of its batch. model: a GPT in training mode, which it is left in; compiled:
    the same compiled for whole batches, used for those. in_step: every process runs it equally
    often, as sharded weights ask for. settings: batch_size, block_size and eval_iters count.
    """
    shares, mine = runtime.data_parallel, runtime.data_rank
    shape = (settings.batch_size, settings.block_size)
    model.eval()
    losses = {}
    for split in ("train", "val"):
        sums, tokens = [torch.zeros((), device=runtime.device)], 0
        batches = evaluation_batches(dataset, split, settings, runtime.device)
        count = batch_count(dataset, split, settings)
        batches = progress(batches, f"evaluating {split}", count, shown=runtime.is_main)
        for index, (x, y) in enumerate(batches):
            if index % shares == 0 and stopping():
                model.train()
                return None
            if index % shares != mine:
                continue
            # a compiled model would be compiled again for the last, smaller batch
            forward = compiled if compiled is not None and x.shape == shape else model
            with runtime.autocast():
                sums.append(forward(x, y)[1] * (counted := loss_tokens(dataset, y)))
            tokens += counted
        if in_step and mine > index % shares:  # the others have one more
            with runtime.autocast():
                model(x, y)
        total = math.fsum(torch.stack(sums).tolist())
        total, count = runtime.mean_over_processes([total, float(tokens)])
        losses[split] = total / count
    model.train()
    return losses


def evaluation_batches(dataset, split, settings, device):
    """Pairs of x, y (b, T) int64 on the device: the whole split, or its fixed sample."""
    if is_whole(split, settings):
        yield from dataset.full_split_batches(
            split, settings.block_size, settings.batch_size, device
        )
        return
    generator = torch.Generator().manual_seed(0)  # of no run: all runs see the same sample
    for _ in range(settings.eval_iters or TRAIN_SAMPLE):
        yield dataset.batch(split, settings.batch_size, settings.block_size, generator, device)


def loss_tokens(dataset, y):
    """How many targets y have a loss."""
    return y.numel() if dataset.row_tokens is None else int((y >= 0).sum())


def is_whole(split, settings):
    """Is all of this split evaluated, not a sample?"""
    return split == "val" and settings.eval_iters == 0


def batch_count(dataset, split, settings):
    """How many batches evaluation_batches yields."""
    if is_whole(split, settings):
        return -(-dataset.block_count(split, settings.block_size) // settings.batch_size)
    return settings.eval_iters or TRAIN_SAMPLE
