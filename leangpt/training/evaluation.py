"""The losses a run is judged by: always over the same batches, shared out over the processes.

Training is not disturbed: dropout is off, and no random number that it uses is drawn here.
"""

import math

import torch

TRAIN_SAMPLE = 50  # batches that estimate the training loss where eval_iters=0


@torch.no_grad()
def evaluate(trainer):
    """Mean loss of both splits -> {"train": float, "val": float}, or None if a signal came first.

    Over the whole validation split (eval_iters=0), or a fixed sample. Every token weighs the same,
    whatever the size of its batch.
    """
    settings, runtime = trainer.settings, trainer.runtime
    shape = (settings.batch_size, settings.block_size)
    trainer.raw_model.eval()
    losses = {}
    for split in ("train", "val"):
        sums, tokens = [torch.zeros((), device=runtime.device)], 0
        batches = evaluation_batches(trainer.dataset, split, settings, runtime.device)
        for index, (x, y) in enumerate(batches):
            if runtime.world_size == 1 and trainer.stopping():
                trainer.raw_model.train()
                return None
            if index % runtime.world_size != runtime.rank:
                continue
            # a compiled model would be compiled again for the last, smaller batch
            model = trainer.model if x.shape == shape else trainer.raw_model
            with runtime.autocast():
                sums.append(model(x, y)[1] * y.numel())
            tokens += y.numel()
        total = math.fsum(torch.stack(sums).tolist())
        total, count = runtime.mean([total, float(tokens)])
        losses[split] = total / count
    trainer.raw_model.train()
    return losses


def evaluation_batches(dataset, split, settings, device):
    """Pairs of x, y (b, T) int64 on the device: the whole split, or its fixed sample."""
    if split == "val" and settings.eval_iters == 0:
        yield from dataset.full_split_batches(
            split, settings.block_size, settings.batch_size, device
        )
        return
    generator = torch.Generator().manual_seed(0)  # of no run: all runs see the same sample
    for _ in range(settings.eval_iters or TRAIN_SAMPLE):
        yield dataset.batch(split, settings.batch_size, settings.block_size, generator, device)
