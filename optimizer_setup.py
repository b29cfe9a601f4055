"""From settings to an optimizer: variant, options given as text, and the learning rate schedule."""

import ast
import inspect
import math
import re

import torch

from errors import UserError
from optimizer_core import COMMON
from optimizers import EMBEDDING_OPTIONS, VARIANTS, build_optimizer


def make_optimizer(settings, model, runtime):
    """The optimizer of a run: variant, rates and options of `settings`. Raises UserError."""
    options = parse_options(settings.optimizer_options)
    check_option_types(settings.optimizer_variant, options)
    if options.get("fused_backward"):  # gradients are gone before anything could use them
        options["grad_clip"] = settings.grad_clip
        if settings.gradient_accumulation_steps != 1:
            raise UserError("fused_backward=True needs gradient_accumulation_steps=1, not "
                            f"{settings.gradient_accumulation_steps}")
        if runtime.dtype == torch.float16:
            raise UserError("fused_backward=True cannot unscale float16 gradients: use bfloat16")
    betas = None
    if settings.beta1 is not None or settings.beta2 is not None:
        own = (0.9, 0.95)
        if settings.optimizer_variant in VARIANTS:
            own = VARIANTS[settings.optimizer_variant].options.get("betas", own)
        betas = tuple(o if b is None else b for b, o in zip((settings.beta1, settings.beta2), own))
    return build_optimizer(model, settings.optimizer_variant, settings.learning_rate,
                           settings.weight_decay, betas, settings.embedding_lr, **options)


def check_param_dtype(settings):
    """Raise UserError where weights of `param_dtype` could not be trained as `settings` say.

    bfloat16 weights have 8 bits: most updates are smaller than the distance to the next number, so
    they only add up where they are rounded stochastically, as all optimizers here but torch's do.
    """
    if settings.param_dtype == "float32":
        return
    if settings.param_dtype != "bfloat16":
        raise UserError(f"unknown param_dtype {settings.param_dtype!r}; use float32 or bfloat16")
    if settings.dtype not in ("auto", "bfloat16"):
        raise UserError(f"param_dtype=bfloat16 computes in bfloat16: leave out dtype="
                        f"{settings.dtype}")
    if settings.optimizer_variant == "adam":
        raise UserError("param_dtype=bfloat16 needs an optimizer that rounds stochastically, which "
                        "adam does not: use adamsn8, muonsn8 or another")


def parse_options(text):
    """"partition=row,momentum_bits=8" -> {"partition": "row", "momentum_bits": 8}."""
    options = {}
    parts = re.split(r",(?![^({\[]*[)}\]])", text)  # not at commas inside brackets
    for part in filter(None, (part.strip() for part in parts)):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier() or not value:
            raise UserError(f"optimizer_options: {part!r} is not name=value; "
                            "write them as partition=row,norm=mean")
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
    defaults = dict(COMMON)
    for function in (build_optimizer, VARIANTS[variant].cls):
        defaults |= {name: parameter.default
                     for name, parameter in inspect.signature(function).parameters.items()}
    for name in EMBEDDING_OPTIONS.get(VARIANTS[variant].cls, ()):
        defaults[f"embedding_{name}"] = defaults.get(name, 0.9)  # beta1 has no default of its own
    for name, value in options.items():
        default = defaults.get(name)
        fits = {bool: (bool,), int: (int,), float: (int, float)}.get(type(default))
        if fits is not None and type(value) not in fits:
            raise UserError(f"optimizer_options: {name}={value} should be "
                            f"{type(default).__name__}, as {name}={default} is")


def lr_factor(iteration, settings):
    """What every learning rate is multiplied by: linear warmup, then lr_schedule to min_lr.

    From 1 / (warmup_iters + 1) up to 1, down to min_lr / learning_rate (a tenth unless set) at
    lr_decay_iters (max_iters unless set), and there it stays. nanoGPT's schedule, as a factor;
    lr_schedule=linear goes down in a straight line instead of a cosine.
    """
    if not settings.decay_lr:
        return 1.0
    if iteration < settings.warmup_iters:
        return (iteration + 1) / (settings.warmup_iters + 1)
    floor = 0.1
    if settings.min_lr is not None:
        variant = VARIANTS[settings.optimizer_variant]
        floor = settings.min_lr / (settings.learning_rate or variant.learning_rate)
    decay_iters = settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    if iteration >= decay_iters:
        return floor
    progress = (iteration - settings.warmup_iters) / (decay_iters - settings.warmup_iters)
    if settings.lr_schedule == "linear":
        return floor + (1.0 - progress) * (1.0 - floor)
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (1.0 - floor)
