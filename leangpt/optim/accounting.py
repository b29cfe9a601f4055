"""How many bytes of state an optimizer keeps, and how it treats each parameter."""

import inspect

import torch
from torch import nn

from leangpt.optim.adafactor import Adafactor
from leangpt.optim.adamsn import AdamSN
from leangpt.optim.arithmetic import zeros_as
from leangpt.optim.base import COMMON, MemoryOptimizer
from leangpt.optim.batches import as_rows
from leangpt.optim.build import make_groups, resolve_recipe
from leangpt.optim.muonsn import MuonSN
from leangpt.optim.rates import model_width
from leangpt.optim.roles import place_parameters
from leangpt.optim.sharded.rows import local


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor that `optimizer` keeps between steps, on this rank."""
    tensors = {}
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                tensors[id(value)] = local(value)
    return sum(t.numel() * t.element_size() for t in tensors.values())


def planned_bytes(optimizer: torch.optim.Optimizer, p: nn.Parameter, group: dict) -> int:
    """Bytes of state that parameter `p` of `group` has, or will have after its first step."""
    if optimizer.state.get(p):
        values = optimizer.state[p].values()
        tensors = [local(v) for v in values if torch.is_tensor(v)]
    elif isinstance(optimizer, MemoryOptimizer):
        tensors = list(optimizer.planned_state(p, group).values())
    else:  # torch's AdamW: two moments and a float32 step count
        return 2 * local(p).numel() * p.element_size() + 4
    return sum(t.numel() * t.element_size() for t in tensors)


def planned_groups(model: nn.Module, variant: str, **options) -> tuple[type, list[dict]]:
    """(class, groups with every option) that build_optimizer would make, without building it.

    model may lie on the meta device. For a planner: the first torch.optim.Optimizer of a process
    takes a second, as torch then loads its compiler. options: the variant's own, but for
    fused_backward. Raises UserError, as build_optimizer.
    """
    placed = place_parameters(model)
    partition = options.pop("partition", None)
    role_rates = options.pop("role_rates", None)
    width = model_width(placed)
    recipe = resolve_recipe(variant, width, None, None, role_rates, partition, dict(options))
    parameters = inspect.signature(recipe.cls).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if issubclass(recipe.cls, MemoryOptimizer):
        defaults |= COMMON
    groups = [defaults | recipe.options | g for g in make_groups(placed, recipe, weight_decay=0.1)]
    if issubclass(recipe.cls, MemoryOptimizer):
        for group in groups:
            recipe.cls.__new__(recipe.cls).check_group(group)
    return recipe.cls, groups


def new_state(cls: type, p: torch.Tensor, group: dict, shards=None) -> dict[str, torch.Tensor]:
    """The state that parameter `p` of such a group will have, as tensors on the meta device.

    shards: the RowShards of which `p` is one process's rows; None: it is whole."""
    meta = p.detach().to("meta")
    if issubclass(cls, MemoryOptimizer):
        return cls.__new__(cls).new_state(as_rows(meta, group), group, shards)
    moments = {name: zeros_as(meta, meta.dtype) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.empty((), device="meta"), **moments}  # torch's AdamW


def optimizer_table(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Which parameters are updated how, with how many bytes of state: a table as text.

    A line per group and role (optim/roles.py), with the learning rate as it is now. State that does
    not exist yet is counted as it will be after the first step. Raises AssertionError unless every
    trainable parameter of `model` is in exactly one group.
    """
    placed = {id(p): placement for _, p, placement in place_parameters(model)}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(placed), (
        "each parameter in just one group"
    )
    rows = [
        ("role", "tensors", "parameters", "lr", "decay", "state bytes", "per parameter", "update")
    ]
    numbers = total = 0
    for group in optimizer.param_groups:
        by_role = {}
        for p in group["params"]:
            by_role.setdefault(placed[id(p)].role, []).append(p)
        for role, params in by_role.items():
            count = sum(local(p).numel() for p in params)
            size = sum(planned_bytes(optimizer, p, group) for p in params)
            rows.append(
                (
                    role,
                    str(len(params)),
                    f"{count:,}",
                    f"{float(group['lr']):.3g}",
                    f"{group['weight_decay']:g}",
                    f"{size:,}",
                    f"{size / max(1, count):.3f}",
                    method_of(optimizer, group, params),
                )
            )
            numbers, total = numbers + count, total + size
    share = f"{100 * total / max(1, 8 * numbers):.1f}% of Adam's"
    each = f"{total / max(1, numbers):.3f}"
    rows.append(("total", str(len(held)), f"{numbers:,}", "", "", f"{total:,}", each, share))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def method_of(optimizer, group, params):
    """How these parameters of a group are updated, in a few words."""
    momentum = ""
    if group.get("momentum_bits", 32) < 32 and group.get("momentum", 1) > 0:
        momentum = f", {group['momentum_bits']}-bit momentum"
    if isinstance(optimizer, AdamSN):
        if all(p.ndim < 2 for p in params):
            return "Adam"
        stored = ", stored (in, out)" if group["transposed"] else ""
        if isinstance(optimizer, MuonSN) and group["orthogonalize"]:
            blocks = f", {len(group['row_blocks'])} blocks apart" if group["row_blocks"] else ""
            return f"orthogonalised, a second moment per row{blocks}{stored}{momentum}"
        if group["partition"] in ("element", 1):
            return f"Adam{momentum}"
        quasi = "" if group["nu1"] == 1 else ", quasi-hyperbolic"
        partition = group["partition"]
        subset = f"run of {partition}" if isinstance(partition, int) else partition
        return f"AdamSN{quasi}, {group['norm']} over each {subset}{stored}{momentum}"
    if isinstance(optimizer, Adafactor):
        whole = not group["factored"] or all(p.ndim < 2 for p in params)
        how = "each element" if whole else "rows and columns"
        return f"Adafactor, {how}{momentum}"
    return type(optimizer).__name__
