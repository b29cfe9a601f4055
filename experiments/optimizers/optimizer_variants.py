"""From a variant's name to its optimizer and its learning-rate grid, for the experiments."""

import ast
import importlib
import re

from experiments.optimizers.many_runs import Cohort, Run
from experiments.optimizers.peers import PEERS, state_bytes_of
from experiments.optimizers.stacked_gpt import StackedGPT
from leangpt.optim import VARIANTS, build_optimizer, state_bytes
from leangpt.system.errors import UserError

LINEAR = (2e-3, 4e-3, 8e-3, 1.6e-2)
EMBEDDING = (4e-3, 8e-3, 1.6e-2)

# Where a learning rate means something else than AdamW's (a step's size in units of the weight),
# the same grid is moved by a factor: (linear, embedding).
SCALES = {
    "adamsn:norm=sum": (16, 1),  # a sum over about 256 elements is 16 times its mean's root
    "pytorch_optimizer_adamwsn": (8, 1),  # the same over about 128
    "torch_adafactor": (16, 8),  # relative to a weight's RMS
    "galore_adamw": (4, 1),  # its scale of 0.25 multiplies the update
}

OURS = (
    "torch_adamw",
    "adamsn",
    "adamsn:norm=sum+partition=larger",
    "adamsn8",
    "adafactor",
    "adafactor:momentum=0.9",
    "muonsn",
    "muonsn8",
    "muonsn4",
    "muonsn0",
)

# Options whose worth is to be found out, one at a time. Run with a small grid that climbs:
# --linear_lrs=4e-3,8e-3 --embedding_lrs=8e-3 --confirm_seeds=0
# Rows of options that did not help and are gone since: partition=column, head and head_column of
# adamsn were made at commit 6ad1d91, per_head of muonsn8 and muonsn4 at 57632a3 and c994acd.
ABLATIONS = {
    "ablation_adamsn": (
        "adamsn",
        "adamsn:partition=larger",
        "adamsn:partition=32",
        "adamsn:partition=8",
        "adamsn:partition=element",
        "adamsn:partition={'qkv':'element'}",
        "adamsn:partition={'attn_out':'element'}",
        "adamsn:partition={'mlp_in':'element'}",
        "adamsn:partition={'mlp_out':'element'}",
        "adamsn:betas=(0.95,0.99)",
        "adamsn:betas=(0.8,0.99)",
        "adamsn:betas=(0.9,0.95)",
        "adamsn:betas=(0.9,0.999)",
        "adamsn:embedding_partition='row'",
        "adamsn:update_clip=1.0",
        "adam:betas=(0.95,0.99)",
        "adam:betas=(0.9,0.95)",
        "adam:betas=(0.9,0.999)",
        "adam:betas=(0.8,0.99)",
    ),
    "ablation_adafactor": (
        "adafactor",
        "adafactor:clip=None",
        "adafactor:clip=0.5",
        "adafactor:clip=2.0",
        "adafactor:betas=(0.9,0.95)",
        "adafactor:betas=(0.9,0.98)",
        "adafactor:betas=(0.9,0.999)",
        "adafactor:decay=0.6",
        "adafactor:decay=1.0",
        "adafactor:weight_decay=0.3",
        "adafactor:weight_decay=0.02",
        "adafactor:momentum=0.9",
        "adafactor:momentum=0.9+momentum_bits=8",
        "adafactor:momentum=0.5",
    ),
    "ablation_second": (  # what the first round suggests, together
        "adafactor:decay=1.0+clip=2.0",
        "adafactor:decay=1.0+betas=(0.9,0.98)",
        "adafactor:decay=1.0+betas=(0.9,0.995)",
        "adafactor:momentum=0.8",
        "adafactor:momentum=0.8+decay=1.0",
        "adam:betas=(0.7,0.99)",
        "adam:betas=(0.8,0.95)",
        "adamsn:betas=(0.8,0.99)+partition=8",
        "adamsn:betas=(0.7,0.99)",
        "adamsn:betas=(0.8,0.99)+partition={'mlp_out':'element'}",
    ),
    "ablation_muonsn": (
        "muonsn",
        "muonsn:momentum=0.8",
        "muonsn:momentum=0.9",
        "muonsn:momentum=0.98",
        "muonsn:nu=0.95",
        "muonsn:nu=1.0",
        "muonsn:ns_steps=3",
        "muonsn:ns_steps=7",
        "muonsn:row_beta2=0.8",
        "muonsn:row_beta2=0.99",
        "muonsn:weight_decay=0.02",
        "muonsn:weight_decay=0.3",
        "muonsn:betas=(0.8,0.99)",
        "muonsn:betas=(0.95,0.99)",
        "muonsn:betas=(0.9,0.95)",
        "muonsn:betas=(0.9,0.999)",
        "muonsn:embedding_partition='row'",
        "muonsn8",
        "muonsn4",
        "muonsn4:momentum=0.8",
        "muonsn4:momentum=0.95",
        "muonsn0",
        "muonsn0:ns_steps=3",
        "muonsn0:ns_steps=2",
        "muonsn0:momentum_bits=8",
    ),
}

PACKAGES = {
    "torchao_adamw8bit": "torchao.optim",
    "torchao_adamw4bit": "torchao.optim",
    "bitsandbytes_adamw8bit": "bitsandbytes",
    "galore_adamw": "galore_torch.adamw",
    "apollo_adamw": "apollo_torch.apollo",
    "apollo_mini": "apollo_torch.apollo",
    "adam_mini": "adam_mini",
    "pytorch_optimizer_adamwsn": "pytorch_optimizer",
}


def expand(variants):
    """'ours,adamsn:norm=sum' -> list of variant names. Raises UserError for an unknown one."""
    lists = {"ours": OURS, "peers": tuple(PEERS), **ABLATIONS}
    names = []
    for name in re.split(r",(?![^({\[]*[)}\]])", variants):  # not at commas inside brackets
        for variant in lists.get(name, (name,)):
            base = variant.partition(":")[0]
            if base not in VARIANTS and base not in PEERS:
                known = ", ".join([*lists, *VARIANTS, *PEERS])
                raise UserError(f"unknown variant {base!r}; choose from: {known}")
            names.append(variant)
    return list(dict.fromkeys(names))


def is_peer(variant):
    """Is it an optimizer of others'?"""
    return variant in PEERS


def missing_package(variant):
    """Name of the package that a peer lacks here, or None."""
    name = PACKAGES.get(variant)
    if name is None:
        return None
    try:
        importlib.import_module(name)
    except ImportError:
        return name.partition(".")[0]
    return None


def grid(variant):
    """(linear rates, embedding rates) to start from."""
    known = [name for name in SCALES if variant.startswith(name)]
    linear, embedding = SCALES[max(known, key=len)] if known else (1, 1)
    return [rate * linear for rate in LINEAR], [rate * embedding for rate in EMBEDDING]


def parse_options(variant):
    """'adamsn:norm=sum+partition=larger' -> ('adamsn', {'norm': 'sum', ...})."""
    name, _, text = variant.partition(":")
    options = {}
    for item in filter(None, text.split("+")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"option {item!r} of {variant!r} is not key=value")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value  # a word
    return name, options


def build(cohorts, setup):
    """Optimizers of all cohorts (many_runs.train_runs): a peer's by its own function; ours from
    the replicas as modules, one object a variant, so that its kernels see all replicas at once."""
    optimizers, ours = [], {}
    for run, cohort in cohorts:
        if is_peer(run.variant):
            optimizers += PEERS[run.variant](run, cohort, setup)
            continue
        optimizer = build_ours(run, cohort, setup)
        if run.variant not in ours:
            ours[run.variant] = optimizer
            continue
        for group in optimizer.param_groups:
            ours[run.variant].add_param_group(group)
    return [*optimizers, *ours.values()]


def build_ours(run, cohort, setup):
    """build_optimizer on one cohort's replicas, with the setup's decay and second beta."""
    name, options = parse_options(run.variant)
    beta1, _ = VARIANTS[name].options.get("betas", setup.betas)
    options = {"weight_decay": setup.weight_decay, "betas": (beta1, setup.betas[1])} | options
    return build_optimizer(
        cohort.module,
        name,
        learning_rate=run.learning_rate,
        embedding_lr=run.embedding_lr,
        **options,
    )


def state_of_one(variant, setup, text, device):
    """{'state_bytes', 'parameters'} of one model after one step: what a user would see."""
    stack = StackedGPT(setup.config(text.vocab_size), [0], device, setup.weights)
    run = Run(variant, 1e-3, 1e-3, 0)
    optimizers = build([(run, Cohort(stack, 0, 1))], setup)
    for weight in stack.weights.values():
        weight.grad.normal_(std=1e-3)
    for optimizer in optimizers:
        optimizer.step()
    parameters = sum(weight.numel() for weight in stack.weights.values())
    return {"state_bytes": optimizer_state_bytes(variant, optimizers), "parameters": parameters}


def optimizer_state_bytes(variant, optimizers):
    """Bytes of state of a variant's optimizers (int)."""
    if is_peer(variant):
        return state_bytes_of(optimizers)
    return sum(state_bytes(optimizer) for optimizer in optimizers)
