"""Parameters sharded by rows over ranks (DTensor, FSDP2): local tensors, and exact reductions.

Optimizers here work on the local rows; for what spans rows (a column mean, a norm, a whole matrix)
see exchange.py. Only Shard(0) and Replicate placements exist under FSDP2; others are refused.
DTensor is imported inside: a plain run never pays for it.
"""

import math

import torch
import torch.distributed as dist

from leangpt.optim.momentum import BLOCK
from leangpt.system.errors import UserError


def is_sharded(tensor):
    """Is this a DTensor? (told by its interface, so that nothing need be imported)"""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local(tensor):
    """The rows of `tensor` on this rank; the tensor itself if it is a plain one."""
    return tensor.to_local() if is_sharded(tensor) else tensor


class RowShards:
    """How one DTensor's rows lie over the ranks: equal shares one after the other, the last ones
    smaller or empty."""

    def __init__(self, tensor):
        self.mesh, self.placements = tensor.device_mesh, tensor.placements
        for placement in self.placements:
            if not (placement.is_replicate() or placement.is_shard(0)):
                raise UserError(f"only rows may be sharded (Shard(0)), not {placement}")
        sharded = [d for d, placement in enumerate(self.placements) if placement.is_shard()]
        if len(sharded) > 1:
            raise UserError("rows may be sharded over one dimension of the mesh, not over several")
        self.shape = tensor.shape
        self.rows = tensor.shape[0] if tensor.ndim else 1
        self.group, self.rank, self.ranks = None, 0, 1
        if sharded:
            self.group = self.mesh.get_group(sharded[0])
            self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)

    @classmethod
    def planned(cls, shape, ranks):
        """Of a tensor of such a shape on so many ranks, for a plan: neither is there yet."""
        planned = cls.__new__(cls)
        planned.shape, planned.rows = torch.Size(shape), shape[0]
        planned.ranks, planned.rank, planned.group = ranks, 0, None
        return planned

    def rows_of(self, rank):
        """(start, stop) of the rows that a rank holds."""
        share = -(-self.rows // self.ranks)
        return min(rank * share, self.rows), min((rank + 1) * share, self.rows)

    def sum(self, partial):
        """Sum of every shard's `partial` (same shape on each rank), in place."""
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)
        return partial


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


def shard_saved(entry, param, replicated):
    """The state of a whole parameter, as a checkpoint has it, for the sharded `param`.

    entry: dict name -> tensor or number; replicated(name): does every rank hold it whole? Tensors
    of no dimension stay as they are. Raises UserError where rows cannot be told apart.
    """
    rows = slice(*RowShards(param).rows_of(RowShards(param).rank))
    sharded = dict(entry)
    for name, value in entry.items():
        if not torch.is_tensor(value) or value.ndim == 0:
            continue
        value = value.to(local(param).device)
        if not replicated(name):
            if name in QUANTIZED and "momentum_scale" in entry:
                if math.prod(param.shape[1:]) % BLOCK:
                    raise UserError(f"blocks of {name} of a weight {tuple(param.shape)} span rows")
                value = value.view(param.shape[0], -1, value.shape[-1])
            if value.shape[0] != param.shape[0]:
                raise UserError(
                    f"{name} of a sharded weight {tuple(param.shape)} is {tuple(value.shape)}"
                )
            value = value[rows]
        sharded[name] = shard_like(value.clone(), param, replicated(name))
    return sharded
