"""Training in about three bytes per parameter: every weight updated, and its gradient freed, while
the backward pass is still running.

bfloat16 weights (2 bytes, rounded stochastically), an 8-bit momentum (1.06 bytes) and a second
moment per row leave gradients as the largest transient. `fuse_into_backward` removes it: a hook on
each parameter runs as soon as its gradient is complete (LOMO, arXiv 2306.09782, does so for SGD).
No gradient ever meets another, so the norm of them all is known when the last has been used: each
is scaled by what the norm of the step before asks for (`max_norm`), or each tensor's update is
clipped (`update_clip`). What needs whole gradients is refused: accumulation over several backward
passes (gradient_sums.py has it), DDP (it reduces after the hooks), GradScaler, closures.

Weights sharded by FSDP2 are updated as soon as a unit's gradients have been reduced and scattered,
all of the unit together: then one message serves many tensors (sharded/exchange.py).

A gradient that is not finite has moved weights by the time anybody can know. It is found at the
end of its step (on CUDA of the next one: nothing waits) or before a checkpoint is written.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from leangpt.optim.backward.taken import TakenGradients
from leangpt.optim.base import MemoryOptimizer
from leangpt.optim.sharded.rows import is_sharded, local
from leangpt.system.errors import UserError


def fuse_into_backward(
    optimizer: MemoryOptimizer,
    max_norm: float = 0.0,
    names: dict | None = None,
    units: Iterable[list[nn.Parameter]] = (),
) -> MemoryOptimizer:
    """Make `loss.backward()` update the parameters of one of the optimizers here.

    Keep the usual loop: backward, then optimizer.step(), which now only ends the step, then
    zero_grad. Set the learning rate before backward. Returns the optimizer.

    max_norm: gradients are scaled by min(1, max_norm / norm), the norm being that of all gradients
    of the step before (none, at the first step); 0: they are not. names: of parameters, {parameter:
    name}, for messages. units: lists of parameters that get their gradients at once, as
    sharded_units finds them; others are units of their own.
    Raises UserError for what cannot work (see above); optimizer.step() then raises
    GradientNotFinite.
    """
    if not updates_inside_backward(optimizer):
        optimizer.strategy = FusedBackward(optimizer, max_norm, names, units)
    return optimizer


def updates_inside_backward(optimizer: torch.optim.Optimizer) -> bool:
    """Is every gradient applied and freed while backward still runs? Of any optimizer."""
    return isinstance(getattr(optimizer, "strategy", None), FusedBackward)


def sharded_units(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters that FSDP2 gathers, reduces and scatters together, unit by unit."""
    units, taken = [], set()
    for module in reversed([*model.modules()]):  # inner ones first
        if hasattr(module, "set_requires_gradient_sync"):  # FSDPModule: told without importing it
            own = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
            taken |= set(map(id, own))
            units.append(own)
    return units


class FusedBackward(TakenGradients):
    """Updates inside backward, and which parameters they moved since the last step()."""

    option = "fused_backward"
    takes_shards = True

    def __init__(self, optimizer, max_norm, names=None, units=()):
        super().__init__(optimizer, max_norm, names)
        self.optimizer = optimizer
        self.squares, self.scales = {}, {}  # by device: this step's sum; what scales gradients
        self.sizes = {}  # parameter -> a number that is finite if its gradient was
        self.unread = None  # those of the step before, on their way from the device
        # parameter -> its unit: how many they are, and [(parameter, gradient, group)] so far
        self.units = {}
        for unit in units:
            self.units |= dict.fromkeys(unit, (len(unit), []))
        self.sharded = any(is_sharded(p) for g in optimizer.param_groups for p in g["params"])

    def take(self, optimizer, p, group):
        """Use a gradient: clipped by the norm of the step before, for p's update."""
        if p in self.sizes:
            raise UserError(
                "a second backward before optimizer.step(): gradients cannot be accumulated with "
                "fused_backward; set gradient_accumulation_steps=1, or gradient_bits=8 instead"
            )
        grad = local(p.grad)
        if self.max_norm:
            self.sizes[p] = self.clip(grad)
        else:
            self.sizes[p] = torch.linalg.vector_norm(grad, torch.inf if grad.numel() else 2)
        size, came = self.units.get(p, (1, []))
        came.append((p, p.grad, group))
        if len(came) < size:
            return
        for p, grad, _ in came:
            p.grad = grad
        optimizer.update_all([(p, group) for p, _, group in came])
        for p, _, _ in came:
            p.grad = None
        came.clear()

    def clip(self, grad):
        """Count a gradient in this step's norm, and scale it by the last one's. Nothing waits.

        Returns the square of its norm.
        """
        device = grad.device
        square = torch.linalg.vector_norm(grad, dtype=torch.float32).square_()
        self.squares[device] = self.squares[device] + square if device in self.squares else square
        if self.norm is None:
            return square
        if device not in self.scales:
            scale = (self.max_norm / (self.norm + 1e-6)).clamp_(max=1.0)
            self.scales[device] = scale.to(device)
        grad.mul_(self.scales[device])
        return square

    def step(self, optimizer, closure):
        """What optimizer.step() does after a fused backward: check, and begin anew."""
        self.refuse(optimizer, closure)
        if self.squares:
            first, *others = self.squares.values()
            square = sum((other.to(first.device) for other in others), first)
            if self.sharded:
                dist.all_reduce(square)
            self.norm = square.sqrt()
        self.squares, self.scales = {}, {}
        self.check()  # of the step before, where that was not waited for
        self.send()
        if self.unread and self.unread[2] is None:  # they have arrived
            self.check()

    def send(self):
        """Let the sizes of this step's gradients go to the host; nothing waits for them."""
        sizes, self.sizes = self.sizes, {}
        if not sizes:
            return
        first = next(iter(sizes.values())).device
        numbers = torch.stack([size.to(first, torch.float32) for size in sizes.values()])
        if self.sharded:  # all ranks find what is not finite, and at the same time
            dist.all_reduce(numbers)
        arrived = None
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(first))
        self.unread = list(sizes), numbers, arrived

    def check(self):
        """Read what `send` has sent, if anything. Raises GradientNotFinite."""
        if self.unread is None:
            return
        (params, numbers, arrived), self.unread = self.unread, None
        if arrived is not None:
            arrived.synchronize()
        if not numbers.isfinite().all():
            self.report(self.optimizer, [p for p, n in zip(params, numbers) if not n.isfinite()])

    def state_dict(self):
        """The norm that the next step is clipped by, where it is known."""
        return {} if self.norm is None else {"gradient_norm": self.norm}

    def load_state_dict(self, state_dict):
        self.norm = state_dict.get("gradient_norm")
