"""How the processes of a run share it: who holds which weights, and when gradients travel.

    none   one process: nothing is shared
    ddp    every process holds all weights and all state; gradients are averaged behind backward,
           where they lie: in the buckets that travel
    fsdp   a process holds a share of the rows of every weight, gradient and state (FSDP2,
           arXiv 2304.11277). A block's weights are gathered before it runs and dropped after; its
           gradients are reduced and scattered as soon as backward has left it

torch.distributed does the work (DistributedDataParallel, fully_shard): here is what they are told.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from leangpt.memory.run import WHOLE_GRADIENTS
from leangpt.optim.momentum import BLOCK
from leangpt.optim.sharded.rows import is_sharded, local
from leangpt.system.errors import UserError

MODES = ("auto", "none", "ddp", "fsdp")


def check_mode(mode: str, runtime) -> None:
    """Raise UserError where `mode` (MODES) cannot be what this run's processes do."""
    if mode not in MODES:
        raise UserError(f"unknown parallel={mode!r}; choose one of: {', '.join(MODES)}")
    several = runtime.world_size > 1
    if mode == "none" and several:
        raise UserError(
            f"parallel=none is one process, and torchrun started {runtime.world_size}: use auto, "
            "ddp or fsdp"
        )
    if mode in ("ddp", "fsdp") and not several:
        raise UserError(
            f"parallel={mode} needs several processes: start them with torchrun "
            "--standalone --nproc_per_node=2 train.py ..."
        )
    if mode == "fsdp" and runtime.dtype == torch.float16:
        raise UserError("parallel=fsdp does not scale float16 gradients: use dtype=bfloat16")
    if mode == "fsdp" and runtime.device_type not in ("cpu", "cuda"):
        raise UserError(f"parallel=fsdp runs on CUDA and the CPU, not on {runtime.device_type}")


class Parallel:
    """One run's way of sharing. mode: "none", "ddp" or "fsdp", no longer "auto"."""

    def __init__(self, mode: str, runtime):
        """Raises UserError where the mode cannot work: see check_mode."""
        check_mode(mode, runtime)
        self.mode, self.runtime = mode, runtime
        self.model = None  # what gets told when gradients travel
        self.reduces_each = False  # are gradients reduced after every micro-batch?

    def shard(self, model: nn.Module, units: Iterable[nn.Module]) -> None:
        """Leave this process its rows of every weight, where mode is fsdp; before an optimizer is
        made. Each of `units`, modules of the model, is gathered and dropped as one; the rest too.

        Products run in the runtime's dtype: float32 masters are gathered in it, and their gradients
        reduced in float32; bfloat16 weights and gradients travel as they are.
        """
        if self.mode != "fsdp":
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        masters = next(model.parameters()).dtype
        narrow = self.runtime.dtype if self.runtime.dtype != masters else None
        options = dict(
            mesh=dist.init_device_mesh(self.runtime.device_type, (self.runtime.world_size,)),
            mp_policy=MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=narrow and masters),
        )
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        for unit in units:
            fully_shard(unit, **options)
        fully_shard(model, **options)
        self.model = model
        if self.runtime.device_type == "cuda":
            memory = torch.cuda.get_device_properties(self.runtime.device).total_memory
            self.reduces_each = whole > WHOLE_GRADIENTS * memory

    def compiled(self, model: nn.Module, T: int) -> nn.Module:
        """A GPT compiled for training on T tokens: as it likes best or, where its blocks talk to
        other processes, block by block."""
        if self.mode != "fsdp" and self.runtime.context_parallel == 1:
            return model.compiled(T, self.runtime.device_type)
        model.compile_rows()
        return model

    def wrap(self, model: nn.Module, bucket_mb: int | None = None) -> nn.Module:
        """The module to call for a loss whose gradients are to be shared; `model` may be compiled,
        and the module that was sharded. bucket_mb: of gradients that travel together under ddp, as
        many as torch has by itself; torch.compile makes a graph of each."""
        if self.mode != "ddp":
            return model
        self.model = DistributedDataParallel(
            model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb
        )
        return self.model

    def zero_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """After an update: none are left. Under ddp they are the buckets that travel, zeros now, in
        which the next are added up: let go of, they would be made beside them again."""
        optimizer.zero_grad(set_to_none=self.mode != "ddp")

    def begin_micro_batch(self, last: bool) -> None:
        """Before a micro-batch: gradients travel after the last one of an iteration alone, unless
        they are too many to be kept whole till then (`reduces_each`)."""
        if self.mode == "ddp":
            self.model.require_backward_grad_sync = last
        elif self.mode == "fsdp":
            self.model.set_requires_gradient_sync(last or self.reduces_each)
            self.model.set_is_last_backward(last)

    def rest(self) -> None:
        """After forward passes without backward: gathered weights are dropped."""
        if self.mode == "fsdp":
            self.model.reshard()

    def describe(self) -> str:
        """One line for a start-up summary."""
        pieces = self.runtime.context_parallel
        each = "each process holds everything"
        if self.mode == "fsdp":
            each = f"each process holds 1/{self.runtime.world_size} of the rows, " + (
                "gradients reduced after every micro-batch"
                if self.reduces_each
                else "gradients reduced once an iteration"
            )
        rows = f"; sequences in pieces on {pieces} processes" if pieces > 1 else ""
        return f"{self.mode}: {each}{rows}"


def check_codes(optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError where sharded weights have momentum codes that no checkpoint could put
    together again: blocks of numbers that lie in two rows."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            columns = p.numel() // max(1, p.shape[0]) if p.ndim > 1 else BLOCK
            if is_sharded(p) and group.get("momentum_bits", 32) < 16 and columns % BLOCK:
                raise UserError(
                    f"parallel=fsdp: a momentum of {group['momentum_bits']} bits needs weights "
                    f"whose rows are multiples of {BLOCK} numbers, not {tuple(p.shape)}; use "
                    "--optimizer_options=momentum_bits=16"
                )


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_, for sharded gradients too: one sum over the ranks.

    -> the norm of all gradients together before clipping, a () tensor.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if not any(is_sharded(p) for p in parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    grads = [local(p.grad) for p in parameters]
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    square = torch.zeros((), dtype=wide, device=grads[0].device)
    if filled := [g for g in grads if g.numel()]:
        square += torch.stack(torch._foreach_norm(filled, dtype=wide)).square().sum()
    dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_(max=1.0))
    return norm
