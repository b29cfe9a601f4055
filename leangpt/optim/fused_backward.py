"""Training in about three bytes a parameter: every weight updated, and its gradient freed, while
the backward pass is still running.

bfloat16 weights (2 bytes, rounded stochastically), an 8-bit momentum (1.06 bytes) and a second
moment per row leave gradients as the largest transient. `fuse_into_backward` removes it: a hook on
each parameter runs as soon as its gradient is complete (LOMO, arXiv 2306.09782, does so for SGD).
No gradient ever meets another, so the norm of them all is known when the last has been used: each
is scaled by what the norm of the step before asks for (`max_norm`), or each tensor's update is
clipped (`update_clip`). What needs whole gradients is refused: accumulation over several backward
passes, DDP and FSDP (their reductions run after the hooks), GradScaler, closures.
"""

import torch

from leangpt.optim.base import MemoryOptimizer
from leangpt.optim.sharding import is_sharded
from leangpt.system.errors import UserError


def fuse_into_backward(optimizer: MemoryOptimizer, max_norm: float = 0.0) -> MemoryOptimizer:
    """Make `loss.backward()` update the parameters of one of the optimizers here.

    Keep the usual loop: backward, then optimizer.step(), which now only ends the step, then
    zero_grad. Set the learning rate before backward. Returns the optimizer.

    max_norm: gradients are scaled by min(1, max_norm / norm), the norm being that of all gradients
    of the step before (none, at the first step); 0: they are not.
    Raises UserError for what cannot work (see above).
    """
    if not max_norm >= 0:
        raise UserError(f"max_norm must not be negative, and 0 for no clipping, not {max_norm}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise UserError("fused_backward runs on one process: DDP and FSDP reduce too late")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        if is_sharded(p):
            raise UserError("fused_backward does not work with sharded parameters (FSDP)")
        if p.dtype == torch.float16:
            raise UserError("fused_backward cannot unscale float16 gradients: use bfloat16")
    if not updates_inside_backward(optimizer):
        optimizer.strategy = FusedBackward(optimizer, max_norm)
    return optimizer


def updates_inside_backward(optimizer: torch.optim.Optimizer) -> bool:
    """Is every gradient applied and freed while backward still runs? Of any optimizer."""
    return isinstance(getattr(optimizer, "strategy", None), FusedBackward)


class FusedBackward:
    """The hooks of one optimizer, and which parameters they moved since the last step().

    norm: of the gradients of the step before, a () float32 tensor; None: not known yet.
    """

    def __init__(self, optimizer, max_norm):
        self.max_norm, self.norm = max_norm, None
        self.squares, self.scales = {}, {}  # by device: this step's sum; what scales gradients
        self.moved = set()
        self.handles = []
        # GradScaler hands its scale to an optimizer that says it takes one: so step() can see it
        optimizer._step_supports_amp_scaling = True
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                hook = self.make_hook(optimizer, index)
                self.handles.append(p.register_post_accumulate_grad_hook(hook))

    def make_hook(self, optimizer, index):
        """The hook of a parameter of the index-th group (load_state_dict replaces the groups)."""

        @torch.no_grad()
        def hook(p):
            if id(p) in self.moved:
                raise UserError(
                    "a second backward before optimizer.step(): gradients cannot be accumulated "
                    "with fused_backward; set gradient_accumulation_steps=1"
                )
            self.moved.add(id(p))
            optimizer.refuse_sparse(p)
            if self.max_norm:
                self.clip(p.grad)
            optimizer.update_all([(p, optimizer.param_groups[index])])
            p.grad = None

        return hook

    def clip(self, grad):
        """Count a gradient in this step's norm, and scale it by the last one's. Nothing waits."""
        device = grad.device
        square = torch.linalg.vector_norm(grad, dtype=torch.float32).square_()
        self.squares[device] = self.squares[device] + square if device in self.squares else square
        if self.norm is None:
            return
        if device not in self.scales:
            scale = (self.max_norm / (self.norm + 1e-6)).clamp_(max=1.0)
            self.scales[device] = scale.to(device)
        grad.mul_(self.scales[device])

    def step(self, optimizer, closure):
        """What optimizer.step() does after a fused backward: check, and begin anew."""
        if closure is not None:
            raise UserError("closures re-run backward: not with fused_backward")
        if hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf"):
            raise UserError("GradScaler cannot unscale what fused_backward has already applied")
        if self.squares:
            first, *others = self.squares.values()
            self.norm = sum((other.to(first.device) for other in others), first).sqrt()
        self.squares, self.scales = {}, {}
        self.moved.clear()

    def state_dict(self):
        """The norm that the next step is clipped by, where it is known."""
        return {} if self.norm is None else {"gradient_norm": self.norm}

    def load_state_dict(self, state_dict):
        self.norm = state_dict.get("gradient_norm")
