"""From a run's settings to its optimizer: which variants there are, and how a run asks for one.

    python optimizers.py                       the variants, their tuned rates, what they store
    python train.py --optimizer_variant=muonsn8 --optimizer_options=momentum_bits=4,nu=0.9

A variant is a class with tuned rates and options (leangpt/optim/variants.py); which parameter is
updated how follows from its role (leangpt/optim/roles.py). Rates that a run does not name follow
the width of its model (leangpt/optim/rates.py); the schedule below multiplies every group's own.
"""

import ast
import inspect
import re
import textwrap

import torch

from leangpt.optim import VARIANTS, build_optimizer
from leangpt.optim.backward.gradient_sums import BITS
from leangpt.optim.base import COMMON
from leangpt.optim.build import EMBEDDING_OPTIONS
from leangpt.optim.rates import Rates, choose_rates, model_width
from leangpt.optim.roles import place_parameters
from leangpt.system.errors import UserError, exit_cleanly
from leangpt.training.batches import share_of
from leangpt.training.schedule import warmup_and_decay


def make_optimizer(settings, model, runtime) -> torch.optim.Optimizer:
    """The optimizer of a run.

    settings: train.py's; read are optimizer_variant, optimizer_options, learning_rate,
    embedding_lr, weight_decay, beta1, beta2, grad_clip, gradient_accumulation_steps and batch_size.
    runtime: its dtype and data_parallel. Raises UserError for what makes no sense together.
    """
    options = run_options(settings)
    check_freeing(settings, options, runtime.dtype, getattr(runtime, "data_parallel", 1))
    if frees(options):  # gradients are gone before anything else could use them
        options["grad_clip"] = settings.grad_clip
    betas = None
    if settings.beta1 is not None or settings.beta2 is not None:
        own = (0.9, 0.95)
        if settings.optimizer_variant in VARIANTS:
            own = VARIANTS[settings.optimizer_variant].options.get("betas", own)
        betas = tuple(o if b is None else b for b, o in zip((settings.beta1, settings.beta2), own))
    return build_optimizer(
        model,
        settings.optimizer_variant,
        settings.learning_rate,
        settings.weight_decay,
        betas,
        settings.embedding_lr,
        **options,
    )


def frees(options) -> list[str]:
    """Which of the two options that free gradients in backward are set."""
    return [name for name in ("fused_backward", "gradient_bits") if options.get(name)]


def check_freeing(settings, options, dtype, world_size):
    """Raise UserError where a run's gradients cannot be freed in backward as `options` have it.

    dtype: of products; world_size: processes that share the batch."""
    freeing = frees(options)
    if freeing and dtype == torch.float16:
        raise UserError(f"{freeing[0]} cannot unscale float16 gradients: use bfloat16")
    each = share_of(settings, world_size=world_size).count
    if options.get("fused_backward") and each > 1:
        raise UserError(
            "fused_backward=True needs gradient_accumulation_steps=1, not "
            f"{each} for each process: gradient_bits=8 instead adds gradients up"
        )


def run_rates(settings, model) -> Rates:
    """The learning rates of a run, and where they come from."""
    return choose_rates(
        VARIANTS[settings.optimizer_variant],
        model_width(place_parameters(model)),
        settings.learning_rate,
        settings.embedding_lr,
        parse_options(settings.optimizer_options).get("role_rates"),
    )


def lr_factor(iteration, settings, peak) -> float:
    """What every group's `initial_lr` is multiplied by at an iteration (from 0).

    Linear warmup over warmup_iters, then lr_schedule down to min_lr (a tenth unless set) at
    lr_decay_iters (max_iters unless set); 1 throughout with decay_lr=False. peak: the rate of
    linear weights, which min_lr is compared with.
    """
    if not settings.decay_lr:
        return 1.0
    floor = 0.1 if settings.min_lr is None else settings.min_lr / peak
    decay_iters = settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    warmup, schedule = settings.warmup_iters, settings.lr_schedule
    return warmup_and_decay(iteration, warmup, decay_iters, floor, schedule)


# ---------------------------------------------------------------------- options as text


LARGEST = 2**63 - 1  # of an integer that torch takes
OF_SETTINGS = {  # arguments of build_optimizer that a run has settings for
    "betas": "--beta1 and --beta2",
    "model": "--init_from",
    "variant": "--optimizer_variant",
    **{
        name: f"--{name}" for name in ("learning_rate", "embedding_lr", "weight_decay", "grad_clip")
    },
}


def run_options(settings) -> dict:
    """The optimizer_options of a run. Raises UserError for one of another type than its default,
    and for one that is a setting of its own."""
    options = parse_options(settings.optimizer_options)
    for name, value in options.items():
        if name in OF_SETTINGS:
            raise UserError(f"optimizer_options: {name} is set by {OF_SETTINGS[name]}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"optimizer_options: {name} is too large, at most {LARGEST:,}")
    if options.get("gradient_bits", 8) not in BITS:
        raise UserError(f"gradient_bits must be 8 or 4, not {options['gradient_bits']!r}")
    check_option_types(settings.optimizer_variant, options)
    return options


def parse_options(text) -> dict:
    """ "partition=row,momentum_bits=8" -> {"partition": "row", "momentum_bits": 8}.

    Values are Python's, and what is none is a word. Raises UserError for what is not name=value.
    """
    options = {}
    parts = re.split(r",(?![^({\[]*[)}\]])", text)  # not at commas inside brackets
    for part in filter(None, (part.strip() for part in parts)):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier() or not value:
            raise UserError(
                f"optimizer_options: {part!r} is not name=value; "
                "write them as partition=row,norm=mean"
            )
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def check_option_types(variant, options):
    """Raise UserError where an option's type is not that of its default.

    Names are build_optimizer's to check, and an option whose default is None may be anything.
    """
    if variant not in VARIANTS:
        return
    defaults = default_options(VARIANTS[variant].cls)
    for name, value in options.items():
        default = defaults.get(name)
        right = {bool: (bool,), int: (int,), float: (int, float)}.get(type(default))
        if right is not None and type(value) not in right:
            raise UserError(
                f"optimizer_options: {name}={value} should be "
                f"{type(default).__name__}, as {name}={default} is"
            )


def default_options(cls) -> dict:
    """Every option that build_optimizer takes for a class, and its default."""
    defaults = dict(COMMON)
    for function in (build_optimizer, cls):
        parameters = inspect.signature(function).parameters.values()
        defaults |= {parameter.name: parameter.default for parameter in parameters}
    for name in EMBEDDING_OPTIONS.get(cls, ()):
        defaults[f"embedding_{name}"] = defaults.get(name, 0.9)  # beta1 has no default of its own
    return defaults


# ---------------------------------------------------------------------- the variants


def variant_table() -> str:
    """The variants as text: what each is, its rates as tuned 128 wide, the options it sets."""
    lines = [f"{'variant':<10} {'lr':>6} {'embedding_lr':>13}  what it is, in bytes of state"]
    for name, variant in VARIANTS.items():
        rates = f"{variant.learning_rate:>6g} {variant.embedding_lr:>13g}"
        options = [f"{key}={value}" for key, value in variant.options.items()]
        options += [f"role_rates={variant.role_rates}"] if variant.role_rates else []
        text = textwrap.wrap(variant.description, 66) + textwrap.wrap(", ".join(options), 66)
        lines.append(f"{name:<10} {rates}  {text[0]}")
        lines += [" " * 33 + line for line in text[1:]]
    return "\n".join(lines)


if __name__ == "__main__":
    exit_cleanly(lambda: print(variant_table()))
