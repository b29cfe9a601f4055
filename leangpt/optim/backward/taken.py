"""What both ways to free gradients in backward share: a hook on each parameter, what is refused."""

import weakref

import torch

from leangpt.optim.sharded.rows import is_sharded
from leangpt.system.errors import UserError


class GradientNotFinite(RuntimeError):
    """A gradient with inf or nan in it. The message names the parameter."""


def frees_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Are gradients gone when backward is over, and clipped by the optimizer? Of any optimizer."""
    return isinstance(getattr(optimizer, "strategy", None), TakenGradients)


def check_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Raise GradientNotFinite where weights were moved by inf or nan and nobody has said so yet.

    Waits for the device. Of any optimizer; those that do not free gradients find nothing.
    """
    if frees_gradients(optimizer):
        optimizer.strategy.check()


class TakenGradients:
    """A strategy of which a hook takes each gradient as soon as it is complete, and frees it.

    A subclass defines `take` and `step`. max_norm: of all gradients; 0: no clipping. norm: of the
    gradients of the step before, a () float32 tensor; None: not known yet.
    """

    option = ""  # of build_optimizer, for messages
    takes_shards = False  # gradients that FSDP2 has reduced and scattered, too?

    def __init__(self, optimizer, max_norm, names):
        check_parameters(optimizer, max_norm, self.option, self.takes_shards)
        self.max_norm, self.norm = max_norm, None
        self.names = names or {}
        self.handles = []
        # GradScaler hands its scale to an optimizer that says it takes one: so step() can see it
        optimizer._step_supports_amp_scaling = True
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                hook = self.make_hook(optimizer, index)
                self.handles.append(p.register_post_accumulate_grad_hook(hook))

    def make_hook(self, optimizer, index):
        """The hook of a parameter of the index-th group (load_state_dict replaces the groups).

        It does not keep the optimizer alive: a parameter owns its hooks where Python's collector
        of cycles does not look, and model and state would never be freed. Without the optimizer
        gradients stay, as on any model.
        """
        owner = weakref.ref(optimizer)

        @torch.no_grad()
        def hook(p):
            optimizer = owner()
            if optimizer is None:
                return
            if p.grad is None:
                raise UserError(
                    "another optimizer takes this parameter's gradients: its hooks stay on the "
                    "model, so give a new optimizer a new model"
                )
            optimizer.refuse_sparse(p)
            optimizer.strategy.take(optimizer, p, optimizer.param_groups[index])
            p.grad = None

        return hook

    def take(self, optimizer, p, group):
        """What becomes of a gradient, p.grad."""
        raise NotImplementedError

    def refuse(self, optimizer, closure):
        """Raise UserError for what a step() after such hooks cannot do."""
        if closure is not None:
            raise UserError(f"closures re-run backward: not with {self.option}")
        if hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf"):
            raise UserError(f"GradScaler cannot unscale what {self.option} has already used")

    def check(self):
        """See check_gradients."""

    def forget(self):
        """Drop gradients that were taken and not used: zero_grad() asks for it."""

    def report(self, optimizer, bad):
        """Raise GradientNotFinite for parameters `bad`, of which there is at least one."""
        p, more = bad[0], f" (nor of {len(bad) - 1} more)" if len(bad) > 1 else ""
        name = self.names.get(p, f"a parameter {tuple(p.shape)}")
        updates = optimizer.state[p].get("step", 0)
        raise GradientNotFinite(f"the gradient of {name} is not finite{more} after {updates} steps")

    def state_dict(self):
        """What a checkpoint keeps beside states and groups: nothing."""
        return {}

    def load_state_dict(self, state_dict):
        """Take back what `state_dict` gave."""


def check_parameters(optimizer, max_norm, option, takes_shards):
    """Raise UserError where gradients cannot be taken as they come."""
    if not max_norm >= 0:
        raise UserError(f"max_norm must not be negative, and 0 for no clipping, not {max_norm}")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = [is_sharded(p) for p in params]
    if any(sharded) and not takes_shards:
        raise UserError(f"{option} does not work with sharded parameters (FSDP)")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1 and not all(sharded):
            allowed = " or on sharded weights (--parallel=fsdp)" if takes_shards else ""
            raise UserError(f"{option} runs on one process{allowed}: DDP reduces too late")
    for p in params:
        if p.dtype == torch.float16:
            raise UserError(f"{option} cannot unscale float16 gradients: use bfloat16")
