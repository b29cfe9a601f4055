"""Choosing an optimizer by name: which parameter is updated how, at what rate, in how many bytes.

    optimizer = build_optimizer(model, "adamsn", learning_rate=4e-3, weight_decay=0.1)
    print(optimizer_table(model, optimizer))

Each class also works alone, on any parameters: AdamSN, Adafactor, MuonSN (leangpt/optim). To add a
variant, add a Variant to VARIANTS.
"""

import difflib
import inspect
from dataclasses import dataclass, field

import torch
from torch import nn

from leangpt.optim.adafactor import Adafactor
from leangpt.optim.adamsn import AdamSN
from leangpt.optim.base import COMMON, MemoryOptimizer
from leangpt.optim.fused_backward import fuse_into_backward
from leangpt.optim.muonsn import MuonSN
from leangpt.optim.sharding import local
from leangpt.system.errors import UserError

__all__ = [
    "VARIANTS",
    "Adafactor",
    "AdamSN",
    "MuonSN",
    "Variant",
    "build_optimizer",
    "fuse_into_backward",
    "optimizer_table",
    "state_bytes",
]


@dataclass(frozen=True)
class Variant:
    """A named optimizer with its tuned defaults."""

    description: str
    cls: type
    learning_rate: float  # of linear weights
    embedding_lr: float  # of embeddings, an untied head, norms and biases
    options: dict = field(default_factory=dict)
    role_rates: dict = field(default_factory=dict)  # role of linear weights -> factor on its rate


# Learning rates: the best of the grids in results/optimizer_quality.csv (seed setup: 4 layers, 128
# wide, 2000 iterations) or, where seeds cannot tell them apart, a neighbour of it.
# Rates by role and this momentum were chosen by results/adaptive_search.csv (same setup). An MLP's
# output layer wants a sixteenth of its input layer's rate; AdamW gains 0.006 nats by it, what has
# no second moment an element 0.03.
MLP_RATES = {"mlp_in": 2.0, "mlp_out": 0.125}
# Of linear weights, with a share for the step's own gradient (QHAdam's); elsewhere Adam's.
QUASI_HYPERBOLIC = dict(betas=(0.95, 0.95), nu1=0.8, embedding_beta1=0.9, embedding_nu1=1.0)

VARIANTS = {
    "adam": Variant("AdamW, fused: 8 bytes of state a parameter", torch.optim.AdamW, 4e-3, 4e-3),
    "adamsn": Variant(
        "Adam with one second moment per output row of a linear weight: 4 bytes there, 8 elsewhere",
        AdamSN,
        4e-3,
        1.6e-2,
        QUASI_HYPERBOLIC,
        MLP_RATES,
    ),
    "adamsn8": Variant(
        "adamsn, momentum in 8 bits, a second moment per 32 numbers of embeddings: about 1.1 bytes",
        AdamSN,
        4e-3,
        8e-3,
        dict(momentum_bits=8, embedding_partition=32, **QUASI_HYPERBOLIC),
        MLP_RATES,
    ),
    "adafactor": Variant(
        "row and column means for second moments, no momentum: about 0.01 bytes",
        Adafactor,
        2e-3,
        4e-3,
        dict(decay=1.0),
        MLP_RATES,
    ),
    "muonsn": Variant(
        "orthogonalised momentum with a second moment per row: 4 bytes in linear weights, 8 else",
        MuonSN,
        6e-3,
        1.2e-2,
        dict(betas=(0.5, 0.95)),
    ),
    "muonsn8": Variant(
        "muonsn with all momentum in 8 bits: about 1.1 bytes",
        MuonSN,
        6e-3,
        1.2e-2,
        dict(betas=(0.5, 0.95), momentum_bits=8, embedding_partition="row"),
    ),
    "muonsn4": Variant(
        "muonsn with all momentum in 4 bits: about 0.6 bytes",
        MuonSN,
        8e-3,
        1.2e-2,
        dict(betas=(0.5, 0.95), momentum=0.9, momentum_bits=4, embedding_partition="row"),
    ),
    "muonsn0": Variant(
        "muonsn without momentum: about 0.01 bytes",
        MuonSN,
        1.6e-2,
        1.6e-2,
        dict(momentum=0.0, embedding_partition="row"),
    ),
}

# Options of a class that `embedding_...` sets apart for all that is not a linear weight.
EMBEDDING_OPTIONS = {Adafactor: ("momentum", "factored"), AdamSN: ("beta1", "nu1")}
ROLES = ("qkv", "attn_out", "mlp_in", "mlp_out", "linear")  # of linear weights
ROLE_OF_NAME = {  # how the names of nn.Linear modules end
    "c_attn": "qkv",
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "attn.c_proj": "attn_out",
    "o_proj": "attn_out",
    "mlp.c_fc": "mlp_in",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "mlp.c_proj": "mlp_out",
    "down_proj": "mlp_out",
}


def build_optimizer(
    model,
    variant,
    learning_rate=None,
    weight_decay=0.1,
    betas=None,
    embedding_lr=None,
    *,
    role_rates=None,
    partition=None,
    embedding_partition=None,
    fused_backward=False,
    grad_clip=0.0,
    **options,
):
    """The optimizer `variant` for any nn.Module. Every group has a `name` and an `initial_lr`.

    Groups, by role: the weights of nn.Linear modules (not tied to an embedding, not lm_head) are
    "linear", or one group a role ("qkv", "attn_out", "mlp_in", "mlp_out", "linear") where their
    settings differ; embeddings, lm_head and other matrices are "embedding"; everything with fewer
    than two dimensions is "vector" and is not decayed. Only linear weights are compressed
    (adafactor: every matrix), unless embedding_partition says otherwise.

    learning_rate        of linear weights; None: the variant's tuned one
    embedding_lr         of all the rest; None: the variant's tuned one, scaled as learning_rate is
    betas                None: (0.9, 0.95), or the variant's own; adafactor reads only betas[1]
    role_rates           factors on learning_rate, a dict role -> number; None: the variant's; {}:
                         one rate for all
    partition            adamsn: subsets of linear weights, a name or a dict role -> name
    embedding_partition  adamsn, muonsn: subsets of embeddings, e.g. "row" (default "element")
    embedding_momentum   adafactor: momentum of embeddings and vectors alone, 2% of GPT-2's weights
                         or so; momentum_bits is theirs too
    embedding_factored   adafactor: False gives embeddings a second moment an element
    embedding_beta1, embedding_nu1   adamsn: the momentum of all but linear weights, where it is
                         another than theirs
    fused_backward       update inside backward (leangpt/optim/fused_backward.py)
    grad_clip            with fused_backward: its max_norm; 0: update_clip defaults to 1 instead
    options              of the variant's class, e.g. momentum_bits=8, foreach=False, compile=True

    Raises UserError for an unknown variant or option, and for hyperparameters without meaning.
    """
    if variant not in VARIANTS:
        near = difflib.get_close_matches(str(variant), VARIANTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "one of " + ", ".join(VARIANTS)
        raise UserError(f"unknown optimizer variant {variant!r}: {hint}")
    recipe = VARIANTS[variant]
    options = {"betas": (0.9, 0.95)} | recipe.options | options
    options |= {} if betas is None else {"betas": tuple(betas)}
    embedding_partition = embedding_partition or options.pop("embedding_partition", "element")
    options.pop("embedding_partition", None)
    apart = {
        name: options.pop(f"embedding_{name}")
        for name in EMBEDDING_OPTIONS.get(recipe.cls, ())
        if f"embedding_{name}" in options
    }
    if grad_clip and not fused_backward:
        raise UserError("grad_clip is fused_backward's; without it call clip_grad_norm_ yourself")
    for name, rate in (("learning_rate", learning_rate), ("embedding_lr", embedding_lr)):
        if rate is not None and not float(rate) > 0:
            raise UserError(f"{name} must be positive, not {rate}")
    if embedding_lr is None:
        scale = 1.0 if learning_rate is None else learning_rate / recipe.learning_rate
        embedding_lr = recipe.embedding_lr * scale
    learning_rate = recipe.learning_rate if learning_rate is None else learning_rate
    factors = recipe.role_rates if role_rates is None else checked_rates(role_rates)

    groups = []
    for role, params, layout in parameters_by_role(model):
        rest = role in ("embedding", "vector")
        rate = embedding_lr if rest else learning_rate
        rate = rate * factors[role] if factors.get(role, 1) != 1 else rate
        group = {"name": role, "params": params, "lr": rate}
        group["weight_decay"] = 0.0 if role == "vector" else weight_decay
        if issubclass(recipe.cls, AdamSN):
            group |= layout
            group["partition"] = embedding_partition if rest else linear_partition(partition, role)
        if recipe.cls is MuonSN:
            group["orthogonalize"] = not rest
        if rest:
            group |= apart
            if "beta1" in apart:
                group["betas"] = (group.pop("beta1"), *options["betas"][1:])
        groups.append(group)
    groups = merge_alike(groups)
    for group in groups:
        group["initial_lr"] = group["lr"]
    if not groups:
        raise UserError("the model has no trainable parameters")

    if recipe.cls is MuonSN and options.get("momentum") == 0:
        options["betas"] = (0.0, options["betas"][1])  # nor do the embeddings store any
    if recipe.cls is Adafactor:
        options["beta2"] = options.pop("betas")[1]
    if partition is not None and recipe.cls is not AdamSN:
        raise UserError(f"{variant} has no partition: it is adamsn's")
    if fused_backward and not grad_clip:
        options.setdefault("update_clip", 1.0)
    if recipe.cls is torch.optim.AdamW:
        return torch_adamw(groups, options, fused_backward)
    known = set(inspect.signature(recipe.cls).parameters) | set(COMMON)
    known |= {f"embedding_{name}" for name in EMBEDDING_OPTIONS.get(recipe.cls, ())}
    check_options(variant, options, known - {"params", "lr", "weight_decay", "common"})
    optimizer = recipe.cls(groups, lr=learning_rate, **options)
    return fuse_into_backward(optimizer, grad_clip) if fused_backward else optimizer


def torch_adamw(groups, options, fused_backward):
    """torch's AdamW with nanoGPT's settings; its fused kernel where every tensor allows it."""
    known = {"betas", "eps", "maximize", "foreach", "amsgrad", "capturable", "differentiable"}
    if fused_backward:
        raise UserError("adam cannot update inside backward: take adamsn with partition='element'")
    check_options("adam", options, known | {"fused"})
    params = [p for group in groups for p in group["params"]]
    fusable = all(p.is_floating_point() and p.device.type in ("cuda", "cpu") for p in params)
    if not options.get("foreach") and not options.get("differentiable"):
        options.setdefault("fused", fusable)
    try:
        return torch.optim.AdamW(groups, **options)
    except ValueError as error:
        raise UserError(f"adam: {error}") from None


def check_options(variant, options, known):
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(sorted(known))
            raise UserError(f"{variant} has no option {name!r}: {hint}")


# ---------------------------------------------------------------------- who is who


def parameters_by_role(model):
    """[(role, [parameters], layout)] over every trainable parameter of `model`, each just once.

    layout: {"row_blocks": ..., "head_dim": ...} of an attention input projection, from the
    attributes of its nn.Linear; empty otherwise.
    """
    lookups = (nn.Embedding, nn.EmbeddingBag)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, lookups)}
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head":
            if id(module.weight) not in tables:
                linears[id(module.weight)] = (name, module)
    found = {}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        role, layout = "embedding", {}
        if p.ndim < 2:
            role = "vector"
        elif id(p) in linears:
            name, module = linears[id(p)]
            role = linear_role(name, module)
            if getattr(module, "row_blocks", None) is not None:
                head_dim = getattr(module, "head_dim", None)
                layout = {"row_blocks": tuple(module.row_blocks), "head_dim": head_dim}
        key = (role, *layout.values())
        found.setdefault(key, (role, [], layout))[1].append(p)
    return list(found.values())


def linear_role(name, module):
    """qkv, attn_out, mlp_in, mlp_out by nanoGPT's or Llama's names; else "linear"."""
    if hasattr(module, "row_blocks"):
        return "qkv"
    return next((role for end, role in ROLE_OF_NAME.items() if name.endswith(end)), "linear")


def linear_partition(partition, role):
    """The partition of one role: a dict's entry, else its "linear" entry, else row."""
    if isinstance(partition, dict):
        check_roles("partition", partition)
        return partition.get(role, partition.get("linear", "row"))
    return partition or "row"


def checked_rates(role_rates):
    """`role_rates` itself, if it is a dict of roles and positive numbers."""
    if not isinstance(role_rates, dict):
        raise UserError(f"role_rates must be a dict role -> factor, not {role_rates!r}")
    check_roles("role_rates", role_rates)
    for role, factor in role_rates.items():
        if not isinstance(factor, (int, float)) or not factor > 0:
            raise UserError(f"role_rates[{role!r}] must be a positive number, not {factor!r}")
    return role_rates


def check_roles(option, roles):
    for role in roles:
        if role not in ROLES:
            raise UserError(f"{option} has no role {role!r}: known are {', '.join(ROLES)}")


def merge_alike(groups):
    """Join the groups of linear roles that share every setting into one, named "linear"."""
    merged = {}
    for group in groups:
        settings = {k: v for k, v in group.items() if k not in ("params", "name")}
        rest = group["name"] if group["name"] in ("embedding", "vector") else "linear"
        joined = merged.setdefault((rest, repr(sorted(settings.items()))), group | {"params": []})
        joined["params"] = joined["params"] + group["params"]
        if joined["name"] != group["name"]:
            joined["name"] = "linear"
    return list(merged.values())


# ---------------------------------------------------------------------- accounting


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
        tensors = list(optimizer.new_state(local(p).detach().to("meta"), group).values())
    else:  # torch's AdamW: two moments and a float32 step count
        return 2 * p.numel() * p.element_size() + 4
    return sum(t.numel() * t.element_size() for t in tensors)


def method_of(optimizer, group):
    """How a group is updated, in a few words."""
    if isinstance(optimizer, MuonSN) and group["orthogonalize"]:
        heads = ", q and k per head" if group["per_head"] and group["head_dim"] else ""
        blocks = ", q k v apart" if group["row_blocks"] else ""
        return f"orthogonalised, a second moment a row{heads or blocks}"
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
