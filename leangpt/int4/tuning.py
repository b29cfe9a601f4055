"""Fitting the scales and zeros of a 4-bit GPT to the exact model's predictions.

Rounding (int4/rounding.py) keeps what each layer gives close to what it gave. What the errors of
all layers together do to the predictions it does not see. Here the codes stay as they are, and all
scales and zeros follow the gradient of the Kullback-Leibler divergence from the exact model's
predictions, over text that the exact model has written itself: the last stage of EfficientQAT
(Chen et al. 2024, arXiv 2407.11062), with distillation for its loss and no data.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from leangpt.int4.calibration import calibration, own_text, quantize_gpt_
from leangpt.int4.quantize import gather_, int4_layers, swapped
from leangpt.layers.int4_layouts import pack
from leangpt.system.errors import UserError

RATE = 0.03  # Adam's, in units of a layer's mean scale; falls to 0 in a straight line
BETAS = (0.9, 0.99)
TOKENS = 64  # in a text
TEXTS = 64  # a step, fewer where LOGITS would not hold their predictions
LOGITS = 2**24
FRESH = 16  # texts written for each step: every text is read four times


def quantize_and_tune_(model, group_size=32, steps=300, seed=0, report=None):
    """quantize_gpt_, then `steps` of fitting; in place.

    Returns the divergence from the exact model before and after, in nats a token of a text not
    fitted to. Too few steps make it worse: the rounding then stays as it was, and both are alike.
    A copy of the exact model is kept meanwhile. report(step, steps, divergence): called after
    each step.
    Raises UserError for what quantize_gpt_ refuses and for a number of steps below 1.
    """
    if steps < 1:
        raise UserError(f"fitting 4-bit scales needs at least one step, not {steps}")
    exact = copy.deepcopy(model)
    quantize_gpt_(model, group_size, calibration(model, seed=seed))
    at_once = max(1, min(TEXTS, LOGITS // (TOKENS * model.config.vocab_size)))
    rows = max(at_once, FRESH * steps * at_once // TEXTS)
    text = own_text(exact, rows, TOKENS, seed + 1)
    other = own_text(exact, at_once, TOKENS, seed + 2)
    with torch.no_grad():
        before = divergence(model, exact, other).item()
    generator = torch.Generator().manual_seed(seed)
    layers = {name: TunedLayer(layer) for name, layer in int4_layers(model).items()}
    groups = [
        dict(params=[layer.scale, layer.zero], lr=RATE * layer.unit) for layer in layers.values()
    ]
    tuned = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with swapped(model, layers):
        for step in range(steps):
            at = torch.randint(len(text), (at_once,), generator=generator)
            loss = divergence(model, exact, text[at.to(text.device)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=tuned)  # and no one else's gradients
            optimizer.step()
            decay.step()
            if report:
                report(step, steps, loss.item())
        with torch.no_grad():
            after = divergence(model, exact, other).item()
    if not after < before:
        return before, before
    for layer in layers.values():
        layer.store()
    gather_(model)
    return before, after


def divergence(model, exact, idx):
    """Mean KL(exact || model) of the next tokens' probabilities over idx (n, t), in nats."""
    with torch.no_grad():
        wanted = predictions(exact, idx)
    found = predictions(model, idx)
    return F.kl_div(found, wanted, reduction="sum", log_target=True) / idx.numel()


def predictions(model, idx):
    """Log probabilities (n, t, V) after every token of idx, by plain blocks: autograd sees all."""
    x = model.embed(idx)
    for block in model.transformer.h:
        x = block.plain(x)
    return model.lm_head(model.transformer.ln_f(x)).float().log_softmax(-1)


class TunedLayer(nn.Module):
    """In an Int4Linear's place while its scales and zeros are fitted: float32 (N, K/group, 1)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.codes = layer.codes().unflatten(1, (-1, layer.group_size)).float() - 8
        _, scale_zero = layer.plain_order()  # (K/group, N, 2)
        scale, zero = scale_zero.float().transpose(0, 1).unsqueeze(-1).unbind(2)
        self.scale, self.zero = (t.contiguous().requires_grad_() for t in (scale, zero))
        self.unit = scale.abs().mean().item()

    def forward(self, x):
        scale, zero = _stored(self.scale), _stored(self.zero)
        weight = torch.addcmul(zero, self.codes, scale).flatten(1).to(x.dtype)
        bias = self.layer.bias
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def store(self):
        """Give the layer what was found."""
        scale_zero = torch.cat([self.scale, self.zero], -1).detach().transpose(0, 1)
        codes = (self.codes + 8).flatten(1).to(torch.uint8)
        self.layer.store(pack(codes), scale_zero.bfloat16().contiguous())


def _stored(x):
    """What bfloat16 will hold of x, with x's own gradient (straight through)."""
    return x + (x.bfloat16().float() - x).detach()
