"""Which kernels take which tensors: worked out once, then looked up from step to step."""

import torch

from leangpt.optim.kernels import step_cpu, step_cuda
from leangpt.optim.momentum import BLOCK

KERNELS = (step_cuda, step_cpu)  # CUDA's and the CPU's: each has `supports` and `stacks_of`
MOST_PLANS = 1024  # sets of parameters that are remembered


class Dispatch:
    """The plans of one optimizer: for a set of items, the kernels' stacks and what is left."""

    def __init__(self):
        self.plans = {}  # ids of the items -> (fingerprint, stacks, the other items)

    def run(self, items, supports, launch, kernels=KERNELS, most=None):
        """Update by kernels the items that they can take; return the others.

        supports(item): do they know this item's settings? launch(stack): one step of a stack,
        which is of at most `most` numbers.
        """
        if not items:
            return items
        key, seen = tuple(map(id, items)), fingerprint(items)
        plan = self.plans.get(key)
        if plan is None or plan[0] != seen:
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            plan = self.plans[key] = (seen, *make_plan(items, supports, kernels, most))
        for stack in plan[1]:
            launch(stack)
        return plan[2]


def make_plan(items, supports, kernels, most):
    """(stacks for the kernels, items left to PyTorch)."""
    left, stacks, taken = [i for i in items if is_simple(i) and supports(i)], [], set()
    for module in kernels:
        stacks += module.stacks_of([i for i in left if module.supports(i)], most)
        taken = {id(i) for stack in stacks for i in stack.items}
        left = [i for i in left if id(i) not in taken]
    return stacks, [i for i in items if id(i) not in taken]


def is_simple(item):
    """What no kernel goes without: a whole matrix with something in it, all of its tensors
    contiguous on its device, rates that are numbers, and no clipping of the update."""
    p, group = item.param, item.group
    return (
        p.ndim >= 2
        and p.numel() > 0
        and item.shards is None
        and group["foreach"]
        and group["update_clip"] is None
        and not torch.is_tensor(group["lr"])
        and not torch.is_tensor(group["weight_decay"])
        and all(
            t.is_contiguous() and t.device == p.device for t in (p, item.grad, *item.state.values())
        )
        and has_its_sizes(item)
    )


def has_its_sizes(item):
    """Has each state tensor as many numbers as it should? Kernels do not look."""
    size, rows = item.param.numel(), item.param.shape[0]
    blocks = -(-size // BLOCK)
    codes = {torch.int8: blocks * BLOCK, torch.uint8: blocks * BLOCK // 2}
    sizes = {
        "momentum_scale": (blocks,),
        "second_moment": (rows, size // BLOCK),
        "row_mean_square": (rows,),
        "column_mean_square": (size // rows,),
    }
    return all(
        value.numel() in sizes.get(name, (codes.get(value.dtype, size),))
        for name, value in item.state.items()
    )


def fingerprint(items):
    """What must not change for the same stacks to do, but for gradients' addresses.

    Kernels keep the addresses and sizes of weights and state. Items are kept from step to step
    while their state is the same objects; but an object's memory can be another one (`.data`).
    """
    groups = {id(i.group): i.group for i in items}
    settings = [
        (
            key,
            *(v for name, v in group.items() if name not in ("params", "lr", "initial_lr")),
            torch.is_tensor(group["lr"]),
        )
        for key, group in groups.items()
    ]
    of_items = [
        (
            id(i),
            i.step - items[0].step,
            i.param.shape,
            i.param.is_contiguous(),
            i.grad.data_ptr() % 16,
            i.grad.dtype,
            i.grad.is_contiguous(),
        )
        for i in items
    ]
    kept = [t for i in items for t in (i.param, *i.state.values())]
    return settings, of_items, [t.data_ptr() for t in kept], [t.nbytes for t in kept]
