"""A saved optimizer state taken up again: whole, cropped where the model was, or not at all."""

import math

import torch
from torch import Tensor, nn

from leangpt.optim.base import MemoryOptimizer, check_layout
from leangpt.optim.momentum import BLOCK
from leangpt.optim.sharded.rows import RowShards, is_sharded, shard_saved
from leangpt.system.errors import UserError

TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    state: dict | None,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> str | None:
    """Continue `optimizer` from a checkpoint's `optimizer` entry -> None, or why it starts fresh.

    Learning rates, weight decay and betas stay as `optimizer` was built (they come from the
    settings); everything it accumulated comes from `state`, of which nothing is taken where any of
    it does not fit. nanoGPT's AdamW state, ordered as its two groups are, is fitted to torch's Adam
    family parameter by parameter. shapes: of the parameters that the state belongs to, by name; the
    state of one that has lost its last rows since (a shorter context's positions) loses them too.
    """
    if not state:
        return "the checkpoint holds no optimizer state"
    before = dict(optimizer.state), [dict(group) for group in optimizer.param_groups]
    try:
        check_layout(state)
        if not state["state"]:  # saved before the first update
            return None
        state = _in_own_order(optimizer, model, state)
        state = state | {"state": _cropped(optimizer, model, state["state"], shapes or {})}
        if isinstance(optimizer, TORCH_ADAM):  # ours check for themselves
            _check_adam(optimizer, state)
        state = state | {"state": _sharded(optimizer, state["state"])}
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:  # UserError is the first
        optimizer.state.clear()
        optimizer.state.update(before[0])
        for group, kept in zip(optimizer.param_groups, before[1]):
            group.update(kept)
        return str(error)
    for group, built in zip(optimizer.param_groups, before[1]):
        names = ("lr", "initial_lr", "weight_decay", "betas")
        group.update({name: built[name] for name in names if name in built})
    return None


def _in_own_order(optimizer, model, state):
    """`state` with its entries numbered as this optimizer numbers its parameters.

    Adam's options are those it was built with: its saved groups say nothing that settings do not.
    """
    own = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [i for group in state["param_groups"] for i in group["params"]]
    groups = state["param_groups"]
    if isinstance(optimizer, TORCH_ADAM):
        groups = optimizer.state_dict()["param_groups"]
    if any("name" in group for group in state["param_groups"]):
        sizes = [[len(g["params"]) for g in side] for side in (state["param_groups"], groups)]
        if len(saved) != len(own) or sizes[0] != sizes[1]:
            raise UserError(f"it has groups of {sizes[0]} parameters")
        order = own
    else:
        if not isinstance(optimizer, TORCH_ADAM):
            raise UserError(f"nanoGPT's AdamW state does not fit {type(optimizer).__name__}")
        trained = [p for p in model.parameters() if p.requires_grad]
        order = [p for p in trained if p.dim() >= 2] + [p for p in trained if p.dim() < 2]
        if len(saved) != len(order):
            raise UserError(f"it holds {len(saved)} parameters, the model has {len(order)}")
    if groups is state["param_groups"]:
        return state
    entries = {id(p): state["state"][i] for p, i in zip(order, saved) if i in state["state"]}
    found = {number: entries[id(p)] for number, p in enumerate(own) if id(p) in entries}
    return {"state": found, "param_groups": groups}


def _check_adam(optimizer, state):
    """Raise UserError where an entry is not laid out as torch's Adam lays out its own: its
    load_state_dict looks at the number of parameters alone, and takes averages of any shape."""
    numbers = _numbers(optimizer)
    for group in optimizer.param_groups:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        for p in group["params"]:
            entry = state["state"].get(numbers[id(p)])
            if entry is None:
                continue
            if set(entry) != {*names, "step"}:
                raise UserError(f"an entry holds {', '.join(map(str, entry))}")
            step = entry["step"]
            if not isinstance(step, Tensor) or step.numel() != 1 or not 0 < float(step) < 2**53:
                raise UserError(f"it counts no steps, but has {step!r:.50}")
            for name in names:
                kind, shape = _kind(entry[name])
                if shape != tuple(p.shape) or kind not in (p.dtype, torch.float32):
                    raise UserError(f"{name} of a weight {tuple(p.shape)} is {kind} {shape}")


def _kind(value):
    return (value.dtype, tuple(value.shape)) if torch.is_tensor(value) else (type(value), ())


def _numbers(optimizer):
    """id of each parameter -> its place among all of them, as the optimizer's state_dict counts."""
    every = (p for group in optimizer.param_groups for p in group["params"])
    return {id(p): number for number, p in enumerate(every)}


# ---------------------------------------------------------------------- sharded weights


def _sharded(optimizer, entries):
    """Entries by number, of whole parameters, for those of this optimizer that are sharded."""
    numbers, result = _numbers(optimizer), dict(entries)
    for group in optimizer.param_groups:
        for p in filter(is_sharded, group["params"]):
            if (number := numbers[id(p)]) in entries:
                result[number] = _shard(optimizer, entries[number], p, group)
    return result


def _shard(optimizer, entry, p, group):
    if not isinstance(optimizer, MemoryOptimizer):
        return shard_saved(entry, p, lambda name: False)
    shards, whole = RowShards(p), torch.empty(p.shape, dtype=p.dtype, device="meta")
    wanted = optimizer.new_state(whole, group, shards)
    optimizer.check_state(whole, group, entry, wanted)
    return shard_saved(entry, p, lambda name: optimizer.spans_rows(name, whole, group, shards))


# ---------------------------------------------------------------------- fewer rows than were saved


def _cropped(optimizer, model, entries, shapes):
    """Entries by number, those of parameters with fewer rows than `shapes` says cropped to them."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    numbers, result = _numbers(optimizer), dict(entries)
    for name, p in model.named_parameters():
        shape = tuple(shapes.get(name, p.shape))
        if shape == p.shape or shape[1:] != p.shape[1:] or not 0 < len(p) < shape[0]:
            continue
        if (number := numbers.get(id(p))) in entries:
            result[number] = _crop(optimizer, entries[number], p, shape, groups[id(p)])
    return result


def _crop(optimizer, entry, p, shape, group):
    """The state of a parameter of `shape` for its first rows, which are `p`."""
    wanted = {}
    if isinstance(optimizer, MemoryOptimizer):
        optimizer.check_state(torch.empty(shape, dtype=p.dtype, device="meta"), group, entry)
        wanted = optimizer.planned_state(torch.empty_like(p, device="meta"), group)
    cropped = dict(entry)
    for name, value in entry.items():
        if not torch.is_tensor(value) or value.ndim == 0:
            continue
        if tuple(value.shape) == shape or name == "row_mean_square":
            cropped[name] = value[: len(p)].clone()
        elif name in ("momentum", "momentum_scale"):  # blocks of codes
            cropped[name] = value[: -(-p.numel() // BLOCK)].clone()
        elif name == "column_mean_square":  # so that products with row_mean_square stay
            rows = entry["row_mean_square"]
            ratio = rows[: len(p)].mean() / rows.mean()
            cropped[name] = value * ratio.nan_to_num(1.0)
        elif name == "second_moment" and name in wanted:
            cropped[name] = _crop_subsets(value, shape, p, wanted[name].shape, group["norm"])
    return cropped


def _crop_subsets(value, shape, p, wanted, norm):
    """Second moments, a number a run of weights, for the first rows; runs may be shorter there."""
    if value.shape[0] == 1 and value.shape == wanted:  # of columns: over whichever rows there are
        return value
    each, fewer = math.prod(shape) // value.numel(), p.numel() // math.prod(wanted)
    of_weights = value.flatten().repeat_interleave(each)[: p.numel()]
    means = of_weights.view(-1, fewer).mean(1).view(wanted)
    return means * (fewer / each) if norm == "sum" else means
