"""How learning rates go over a run."""

import math

SCHEDULES = {  # share of the way down, from 0 to 1 -> share of the rate that is left
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
}


def warmup_and_decay(
    iteration: int, warmup_iters: int, decay_iters: int, floor: float, schedule: str = "cosine"
) -> float:
    """What a learning rate is multiplied by: linear warmup, then a cosine (nanoGPT's schedule), or
    another of SCHEDULES.

    From 1 / (warmup_iters + 1) at iteration 0 up to 1, down to `floor` at decay_iters, and there it
    stays.
    """
    if iteration < warmup_iters:
        return (iteration + 1) / (warmup_iters + 1)
    if iteration >= decay_iters:
        return floor
    progress = (iteration - warmup_iters) / (decay_iters - warmup_iters)
    return floor + SCHEDULES[schedule](progress) * (1.0 - floor)


def set_rates(optimizer, factor: float):
    """Every group's `lr`: its `initial_lr` times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def linear_rate(optimizer) -> float:
    """The present rate of linear weights, the one that `learning_rate` sets."""
    groups = optimizer.param_groups
    linear = [g for g in groups if g["name"] not in ("embedding", "vector")]
    return (linear or groups)[0]["lr"]
