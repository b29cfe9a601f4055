"""Parameters sharded by rows over ranks (DTensor, FSDP2): local tensors, and exact reductions.

Optimizers here work on the local rows; a statistic that spans rows (a column mean, a norm, a whole
matrix) goes through `RowShards`. Only Shard(0) and Replicate placements exist under FSDP2; others
are refused. Imports of torch.distributed stay inside: a plain run never pays for them.
"""

import math

import torch

from leangpt.optim.momentum import BLOCK
from leangpt.system.errors import UserError


def is_sharded(tensor):
    """Is this a DTensor? (told by its interface, so that nothing need be imported)"""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local(tensor):
    """The rows of `tensor` on this rank; the tensor itself if it is a plain one."""
    return tensor.to_local() if is_sharded(tensor) else tensor


class RowShards:
    """How one DTensor's rows lie over the ranks."""

    def __init__(self, tensor):
        self.mesh, self.placements = tensor.device_mesh, tensor.placements
        for placement in self.placements:
            if not (placement.is_replicate() or placement.is_shard(0)):
                raise UserError(f"only rows may be sharded (Shard(0)), not {placement}")
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.rows = tensor.shape[0] if tensor.ndim else 1
        self.local_rows = tensor.to_local().shape[0] if tensor.ndim else 1

    def sum(self, partial):
        """Sum of every shard's `partial` (same shape on each rank), in place."""
        import torch.distributed as dist

        for dim, placement in enumerate(self.placements):
            if placement.is_shard():
                dist.all_reduce(partial, group=self.mesh.get_group(dim))
        return partial

    def gather(self, rows):
        """Local rows (1, n_local, m) of every rank -> the whole matrix (1, n, m)."""
        from torch.distributed.tensor import DTensor

        shape = (self.rows, *rows.shape[2:])
        whole = DTensor.from_local(
            rows[0].contiguous(),
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )
        return whole.full_tensor().unsqueeze(0)

    def scatter(self, whole):
        """The whole matrix (1, n, m), alike on every rank -> this rank's rows; nothing is sent."""
        from torch.distributed.tensor import DTensor, Replicate

        everywhere = [Replicate()] * self.mesh.ndim
        whole = DTensor.from_local(whole[0], self.mesh, everywhere, run_check=False)
        return whole.redistribute(placements=self.placements).to_local().unsqueeze(0)


QUANTIZED = ("momentum", "momentum_scale")


def shard_state(name, value, param, replicated):
    """A new local state tensor as a DTensor beside `param`, so that checkpoints can reshard it.

    Codes and scales of a quantised momentum, (blocks, width), become (rows, blocks per row, width);
    where a block spans rows they stay as they are, and MemoryOptimizer.state_dict refuses them.
    """
    if name == "momentum_scale" or not value.is_floating_point():
        columns = math.prod(param.shape[1:])
        if columns % BLOCK:
            return value
        value = value.view(len(local(param)), columns // BLOCK, value.shape[1])
    return shard_like(value, param, replicated)


def local_state(name, value, state):
    """A state tensor as an Item has it: this rank's; codes and scales as (blocks, width) again."""
    if is_sharded(value) and "momentum_scale" in state and name in QUANTIZED:
        return local(value).flatten(0, 1)
    return local(value)


def shard_like(value, param, replicated):
    """A local tensor of `param`'s rows, or of which all ranks have the whole, as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    if replicated:
        everywhere = [Replicate()] * param.device_mesh.ndim
        return DTensor.from_local(value, param.device_mesh, everywhere, run_check=False)
    shape = (param.shape[0], *value.shape[1:])
    return DTensor.from_local(
        value,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
