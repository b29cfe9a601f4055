"""Any nn.Module to its optimizer, by a variant's name: resolve the recipe, group the parameters by
role, construct the class.

    optimizer = build_optimizer(model, "muonsn8", learning_rate=4e-3, weight_decay=0.1)
    print(optimizer_table(model, optimizer))
"""

import difflib
import inspect
from dataclasses import dataclass

import torch
from torch import nn

from leangpt.optim.adafactor import Adafactor
from leangpt.optim.adamsn import AdamSN
from leangpt.optim.backward.fused_backward import fuse_into_backward, sharded_units
from leangpt.optim.backward.gradient_sums import BITS, sum_in_bits
from leangpt.optim.base import COMMON, MemoryOptimizer, say_once
from leangpt.optim.muonsn import MuonSN
from leangpt.optim.rates import Rates, choose_rates, model_width
from leangpt.optim.roles import LINEAR_ROLES, place_parameters
from leangpt.optim.variants import VARIANTS
from leangpt.system.errors import UserError

# Options of a class that `embedding_...` sets apart for all that is not a linear weight.
EMBEDDING_OPTIONS = {
    AdamSN: ("partition", "beta1", "nu1"),
    MuonSN: ("partition",),
    Adafactor: ("momentum", "factored"),
}


def build_optimizer(
    model: nn.Module,
    variant: str,
    learning_rate: float | None = None,
    weight_decay: float = 0.1,
    betas: tuple[float, float] | None = None,
    embedding_lr: float | None = None,
    *,
    role_rates: dict[str, float] | None = None,
    partition: str | int | dict | None = None,
    fused_backward: bool = False,
    gradient_bits: int | None = None,
    grad_clip: float = 0.0,
    **options,
) -> torch.optim.Optimizer:
    """The optimizer `variant` for any nn.Module. Every group has a `name` and an `initial_lr`.

    Groups, by role (optim/roles.py): weights of linear layers are "linear", or one group per role
    ("qkv", "attn_out", "mlp_in", "mlp_out", ...) where their settings differ; embeddings, output
    heads and other matrices are "embedding"; everything with fewer than two dimensions is "vector"
    and is not decayed. Only linear weights are compressed (adafactor: every matrix), unless
    embedding_partition says otherwise.

    learning_rate        of linear weights, and of everything where embedding_lr is not given; None:
                         the variant's tuned one at the model's width (optim/rates.py)
    embedding_lr         of all the rest; None: as learning_rate, tuned where that is not given
    weight_decay         decoupled (AdamW's), of matrices
    betas                None: (0.9, 0.95), or the variant's own; adafactor reads only betas[1]
    role_rates           factors on the rate of linear weights, a dict role -> number; None: the
                         variant's, or none where learning_rate is for all
    partition            adamsn: subsets of linear weights, a name or a dict role -> name
    embedding_partition  adamsn, muonsn: subsets of embeddings, e.g. "row" (default "element")
    embedding_momentum   adafactor: momentum of embeddings and vectors alone, 2% of GPT-2's weights
                         or so; momentum_bits is theirs too
    embedding_factored   adafactor: False gives embeddings a second moment per element
    embedding_beta1, embedding_nu1   adamsn: the momentum of all but linear weights, where it is
                         another than theirs
    fused_backward       update inside backward (optim/backward/fused_backward.py)
    gradient_bits        8 or 4: sum the gradients of several backward passes in so many bits and
                         free them (optim/backward/gradient_sums.py)
    grad_clip            with gradient_bits: the largest norm of all gradients; with fused_backward
                         by the norm of the step before; 0: update_clip defaults to 1 there
    options              of the variant's class, e.g. momentum_bits=8, foreach=False

    Raises UserError for an unknown variant or option, for hyperparameters without meaning, and for
    a model without trainable parameters.
    """
    if betas is not None:
        options["betas"] = tuple(betas)
    placed = place_parameters(model)
    recipe = resolve_recipe(
        variant, model_width(placed), learning_rate, embedding_lr, role_rates, partition, options
    )
    groups = make_groups(placed, recipe, weight_decay)
    check_freed(recipe.cls, fused_backward, gradient_bits, grad_clip)
    if recipe.cls is torch.optim.AdamW:
        return torch_adamw(groups, recipe.options)
    clip = {"update_clip": 1.0} if fused_backward and not grad_clip else {}
    optimizer = recipe.cls(groups, lr=recipe.rates.linear, **(clip | recipe.options))
    names = {p: name for name, p, _ in placed}
    if gradient_bits:
        return sum_in_bits(optimizer, gradient_bits, grad_clip, names)
    if fused_backward:
        fuse_into_backward(optimizer, grad_clip, names, sharded_units(model))
    return optimizer


def check_freed(cls, fused_backward, gradient_bits, grad_clip):
    """Raise UserError where backward cannot free gradients as these arguments of build_optimizer
    ask it to, for an optimizer of that class."""
    if grad_clip and not (fused_backward or gradient_bits):
        raise UserError(
            "grad_clip is for gradients that backward frees (fused_backward, gradient_bits): else "
            "call clip_grad_norm_ yourself"
        )
    if fused_backward and gradient_bits:
        raise UserError(
            "fused_backward uses gradients at once, gradient_bits sums them first: leave out one"
        )
    if gradient_bits and gradient_bits not in BITS:
        raise UserError(f"gradient_bits must be 8 or 4, not {gradient_bits!r}")
    if cls is torch.optim.AdamW:
        if fused_backward:
            raise UserError("adam cannot update inside backward: take adamsn, partition='element'")
        if gradient_bits:
            raise UserError("adam cannot sum gradients in bits: take adamsn, partition='element'")


# ---------------------------------------------------------------------- the recipe


@dataclass(frozen=True)
class Recipe:
    """What a variant's defaults and the caller's wishes come to."""

    cls: type
    rates: Rates
    partition: object  # AdamSN's, of linear weights: a name, an int, or a dict by role
    options: dict  # of the class
    embedding_options: dict  # of the groups that are no linear weights, where they differ


def resolve_recipe(
    variant, width, learning_rate, embedding_lr, role_rates, partition, options
) -> Recipe:
    """The Recipe of a variant; None stands for its own. Raises UserError, as build_optimizer."""
    if variant not in VARIANTS:
        raise UserError(f"unknown optimizer variant {variant!r}: {closest(variant, VARIANTS)}")
    tuned = VARIANTS[variant]
    for name, rate in (("learning_rate", learning_rate), ("embedding_lr", embedding_lr)):
        if rate is not None and not float(rate) > 0:
            raise UserError(f"{name} must be positive, not {rate}")
    if role_rates is not None:
        check_rates(role_rates)
    if partition is not None and tuned.cls is not AdamSN:
        raise UserError(f"{variant} has no partition: it is adamsn's")

    options = {"betas": (0.9, 0.95)} | tuned.options | options
    check_options(variant, tuned.cls, options)
    if not isinstance(options["betas"], tuple | list) or len(options["betas"]) != 2:
        raise UserError(f"betas must be two numbers in [0, 1), not {options['betas']}")
    apart = {
        name: options.pop(f"embedding_{name}")
        for name in EMBEDDING_OPTIONS.get(tuned.cls, ())
        if f"embedding_{name}" in options
    }
    if "beta1" in apart:
        apart["betas"] = (apart.pop("beta1"), *options["betas"][1:])
    if tuned.cls is MuonSN and options.get("momentum") == 0:
        options["betas"] = (0.0, *options["betas"][1:])  # nor do the embeddings store any
    if tuned.cls is Adafactor:
        options["beta2"] = options.pop("betas")[1]
    return Recipe(
        cls=tuned.cls,
        rates=choose_rates(tuned, width, learning_rate, embedding_lr, role_rates),
        partition=partition,
        options=options,
        embedding_options=apart,
    )


def known_options(cls) -> set:
    """Names that build_optimizer takes as **options for an optimizer class."""
    if cls is torch.optim.AdamW:
        names = {"eps", "maximize", "foreach", "amsgrad", "capturable", "fused"}
        return names | {"betas"}
    names = set(inspect.signature(cls).parameters) | set(COMMON) | {"betas"}
    names |= {f"embedding_{name}" for name in EMBEDDING_OPTIONS[cls]}
    set_otherwise = {"params", "lr", "weight_decay", "common", "beta2", "partition"}
    set_otherwise |= {"row_blocks", "transposed"}  # by each weight's role
    return names - set_otherwise


def check_options(variant, cls, options):
    """Raise UserError for an option that the class of `variant` does not have."""
    known = known_options(cls)
    others = {"role_rates"} | ({"partition"} if cls is AdamSN else set())  # of build_optimizer
    others |= {"fused_backward", "gradient_bits"} if cls is not torch.optim.AdamW else set()
    for name in options:
        if name not in known:
            near = closest(name, known | others, "known: ")
            raise UserError(f"{variant} has no option {name!r}: {near}")


def closest(name, known, otherwise="one of "):
    """What was probably meant by a name that is not among the known ones, as a phrase."""
    near = difflib.get_close_matches(str(name), known, n=1)
    names = known if isinstance(known, dict) else sorted(known)
    return f"did you mean {near[0]!r}?" if near else otherwise + ", ".join(names)


def check_rates(role_rates):
    """Raise UserError unless `role_rates` is a dict of roles and positive numbers."""
    if not isinstance(role_rates, dict):
        raise UserError(f"role_rates must be a dict role -> factor, not {role_rates!r}")
    check_roles("role_rates", role_rates)
    for role, factor in role_rates.items():
        if not isinstance(factor, (int, float)) or not factor > 0:
            raise UserError(f"role_rates[{role!r}] must be a positive number, not {factor!r}")


def check_roles(option, roles):
    """Raise UserError for a role that no linear layer has."""
    for role in roles:
        if role not in LINEAR_ROLES:
            raise UserError(f"{option} has no role {role!r}: known are {', '.join(LINEAR_ROLES)}")


# ---------------------------------------------------------------------- the groups


def make_groups(placed, recipe, weight_decay):
    """Parameter groups of a Recipe, those of linear roles that share all settings joined."""
    alike, rates = {}, recipe.rates
    if not placed:
        raise UserError("the model has no trainable parameters")
    if recipe.cls is not torch.optim.AdamW:
        say_what_is_unknown([name for name, _, placement in placed if not placement.known])
    for _, p, placement in placed:
        key = placement.role, placement.row_blocks, placement.transposed
        alike.setdefault(key, []).append(p)
    groups = []
    for (role, row_blocks, transposed), params in alike.items():
        linear = role in LINEAR_ROLES
        rate = rates.linear if linear else rates.embedding
        rate = rate * rates.role_rates[role] if rates.role_rates.get(role, 1) != 1 else rate
        group = {"name": role, "params": params, "lr": rate}
        group["weight_decay"] = 0.0 if role == "vector" else weight_decay
        if transposed and issubclass(recipe.cls, MemoryOptimizer):
            group["transposed"] = True
        if issubclass(recipe.cls, AdamSN):
            group["partition"] = linear_partition(recipe.partition, role) if linear else "element"
            if row_blocks:
                group["row_blocks"] = row_blocks
        if recipe.cls is MuonSN:
            group["orthogonalize"] = linear
        if not linear:
            group |= recipe.embedding_options
        if role == "vector" and "partition" in group:
            group["partition"] = "element"
        groups.append(group)
    return merge_alike(groups)


def say_what_is_unknown(names):
    """Warn, once a process, of matrices that no rule places."""
    if names:
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
        say_once(f"updated as embeddings are, for no known kind of layer has them: {listed}")


def linear_partition(partition, role):
    """The partition of one role: a dict's entry, else its "linear" entry, else row."""
    if isinstance(partition, dict):
        check_roles("partition", partition)
        return partition.get(role, partition.get("linear", "row"))
    return partition or "row"


def merge_alike(groups):
    """Join the groups of linear roles that share every setting into one, named "linear"."""
    merged = {}
    for group in groups:
        settings = {k: v for k, v in group.items() if k not in ("params", "name")}
        kind = "linear" if group["name"] in LINEAR_ROLES else group["name"]
        joined = merged.setdefault((kind, repr(sorted(settings.items()))), group | {"params": []})
        joined["params"] = joined["params"] + group["params"]
        if joined["name"] != group["name"]:
            joined["name"] = "linear"
    for group in merged.values():
        group["initial_lr"] = group["lr"]
    return list(merged.values())


# ---------------------------------------------------------------------- torch's own


def torch_adamw(groups, options):
    """torch's AdamW with nanoGPT's settings; its fused kernel where every tensor allows it."""
    params = [p for group in groups for p in group["params"]]
    fusable = all(p.is_floating_point() and p.device.type in ("cuda", "cpu") for p in params)
    if not options.get("foreach") and not options.get("differentiable"):
        options = {"fused": fusable} | options
    try:
        return torch.optim.AdamW(groups, **options)
    except ValueError as error:
        raise UserError(f"adam: {error}") from None
