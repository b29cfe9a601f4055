"""Which kernels take which tensors: worked out once, then looked up from step to step."""

import torch

from leangpt.optim import step_cpu, step_cuda

KERNELS = (step_cuda, step_cpu)  # CUDA's and the CPU's, each with `fits`, `stacks_of`
MOST_PLANS = 1024  # sets of parameters that are remembered


class Plans:
    """An optimizer's plans."""

    def __init__(self):
        self.plans = {}  # ids of the items -> (fingerprint, stacks, the other items)

    def run(self, items, suits, launch, kernels=KERNELS, most=None):
        """Update by kernels the items that they can take; return the others.

        suits(item): do they know this item's settings? launch(stack): one step of a Stack, which
        is of at most `most` numbers.
        """
        if not items:
            return items
        key, seen = tuple(map(id, items)), fingerprint(items)
        plan = self.plans.get(key)
        if plan is None or plan[0] != seen:
            left, stacks = [i for i in items if suits(i)], []
            for module in kernels:
                stacks += module.stacks_of([i for i in left if module.fits(i)], most)
                taken = {id(i) for same in stacks for i in same.items}
                left = [i for i in left if id(i) not in taken]
            rest = [i for i in items if id(i) not in taken]
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            plan = self.plans[key] = (seen, stacks, rest)
        for same in plan[1]:
            launch(same)
        return plan[2]


def fingerprint(items):
    """What must not change for the same stacks to do, but for gradients' addresses.

    Items are kept from step to step while their state is; so their ids say whose they are.
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
    tensors = [
        (
            id(i),
            i.step - items[0].step,
            i.param.data_ptr(),
            i.grad.data_ptr() % 16,
            i.grad.dtype,
            i.grad.is_contiguous(),
        )
        for i in items
    ]
    return settings, tensors
