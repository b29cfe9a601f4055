"""How many bytes of state an optimizer keeps, and how it treats each parameter."""

import torch

from leangpt.optim.adafactor import Adafactor
from leangpt.optim.adamsn import AdamSN
from leangpt.optim.base import MemoryOptimizer
from leangpt.optim.muonsn import MuonSN
from leangpt.optim.sharding import local


def state_bytes(optimizer):
    """Bytes of every tensor that `optimizer` keeps between steps, on this rank (int)."""
    tensors = {}
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                tensors[id(value)] = local(value)
    return sum(t.numel() * t.element_size() for t in tensors.values())


def planned_bytes(optimizer, p, group):
    """Bytes of state that parameter `p` has, or will have after its first step."""
    if optimizer.state.get(p):
        values = optimizer.state[p].values()
        tensors = [local(v) for v in values if torch.is_tensor(v)]
    elif isinstance(optimizer, MemoryOptimizer):
        tensors = list(optimizer.planned_state(p, group).values())
    else:  # torch's AdamW: two moments and a float32 step count
        return 2 * p.numel() * p.element_size() + 4
    return sum(t.numel() * t.element_size() for t in tensors)


def method_of(optimizer, group):
    """How a group is updated, in a few words."""
    if isinstance(optimizer, MuonSN) and group["orthogonalize"]:
        blocks = ", q k v apart" if group["row_blocks"] else ""
        return f"orthogonalised, a second moment per row{blocks}"
    if isinstance(optimizer, AdamSN):
        if group["partition"] in ("element", 1):
            return "Adam"
        quasi = "" if group["nu1"] == 1 else ", quasi-hyperbolic"
        partition = group["partition"]
        subset = f"run of {partition}" if isinstance(partition, int) else partition
        return f"AdamSN{quasi}, {group['norm']} over each {subset}"
    if isinstance(optimizer, Adafactor):
        return "Adafactor, " + ("rows and columns" if group["factored"] else "each element")
    return type(optimizer).__name__


def optimizer_table(model, optimizer):
    """Which parameters are updated how, with how many bytes of state: a table as text.

    Asserts that every trainable parameter of `model` is in exactly one group. State that does not
    exist yet is counted as it will be after the first step.
    """
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len(set(held)) and set(held) == wanted, "each parameter in just one group"
    rows = [("group", "tensors", "parameters", "lr", "decay", "state bytes", "a param", "update")]
    numbers = total = 0
    for group in optimizer.param_groups:
        count = sum(local(p).numel() for p in group["params"])
        size = sum(planned_bytes(optimizer, p, group) for p in group["params"])
        vectors = all(p.ndim < 2 for p in group["params"])
        method = method_of(optimizer, group)
        if vectors and isinstance(optimizer, AdamSN):
            method = "Adam"
        elif group.get("momentum_bits", 32) < 32 and group.get("momentum", 1) > 0:
            method += f", {group['momentum_bits']}-bit momentum"
        rate = f"{float(group['lr']):.3g}"
        rows.append(
            (
                group.get("name", "-"),
                str(len(group["params"])),
                f"{count:,}",
                rate,
                f"{group['weight_decay']:g}",
                f"{size:,}",
                f"{size / max(1, count):.3f}",
                method,
            )
        )
        numbers, total = numbers + count, total + size
    rows.append(
        (
            "total",
            str(len(held)),
            f"{numbers:,}",
            "",
            "",
            f"{total:,}",
            f"{total / max(1, numbers):.3f}",
            f"{100 * total / max(1, 8 * numbers):.1f}% of Adam's",
        )
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
        lines.append("  ".join(cells))
    return "\n".join(lines)
