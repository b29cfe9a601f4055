"""A GPT in 4 bits: rounded on a text that it writes itself, with a head that rounds well."""

from functools import partial

import torch
from torch import nn

from leangpt.decoding.generate import generate
from leangpt.int4.quantize import linears_of, quantize_
from leangpt.system.errors import UserError


def quantize_gpt_(model, group_size=32, calibrate=None):
    """quantize_ on a GPT, in place; returns the model.

    Its head is evened out first (`even_head_`), which changes its last norm. calibrate: by default
    `calibration(model)`. Raises UserError, with nothing touched, where the model is in 4 bits
    already and for what quantize_ refuses.
    """
    if not isinstance(model.lm_head, nn.Linear):
        raise UserError("the model is in 4 bits already")
    linears_of(model, group_size)
    calibrate = calibrate or calibration(model)
    return quantize_(even_head_(model), group_size, calibrate)


def calibration(model, rows=None, tokens=64, seed=0, text=None):
    """For quantize_: a function that runs the model once on a text it has written itself.

    That is always at hand: `rows` texts of `tokens` tokens, by default 512 for a small model, down
    to 64 for a large one. A model that was trained on much more than it will be used for is better
    rounded on `text` (rows, tokens) int64 of that use, at least some 10,000 tokens of it.
    """
    if text is not None:
        return partial(run_linears, model, text)
    if rows is None:
        rows = max(64, min(512, 2**32 // sum(p.numel() for p in model.parameters())))
    return partial(run_linears, model, own_text(model, rows, tokens, seed))


def own_text(model, rows, tokens, seed=0):
    """Texts (rows, tokens) int64 that the model writes, each from a token at random.

    tokens: at most block_size of them.
    """
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    text = torch.randint(model.config.vocab_size, (rows, 1), generator=generator, device=device)
    tokens = min(tokens, model.config.block_size)
    return text if tokens == 1 else generate(model, text, tokens - 1, generator=generator)


@torch.no_grad()
def run_linears(model, text):
    """Call each linear once on text (rows, tokens) int64."""
    x = model.embed(text)
    for block in model.transformer.h:
        x = block.plain(x)
    model.lm_head(model.transformer.ln_f(x))


@torch.no_grad()
def even_head_(model):
    """The same function from a head that rounds better to few bits, untied from then on; in place.

    A column of large weights coarsens the steps of all the others in its group. So each is
    divided by the root of its size, and the last norm's output multiplied by it.
    """
    weight, norm = model.lm_head.weight, model.transformer.ln_f
    size = weight.float().square().mean(0).sqrt()
    root = (size / size.mean().clamp(min=1e-20)).clamp(min=0.01).sqrt()
    model.lm_head.weight = nn.Parameter((weight / root).to(weight.dtype))
    for parameter in norm.parameters():
        parameter.mul_(root)
    return model
