"""A GPT rounds on a text of its own, with its head evened out."""

import pytest
import torch

from leangpt.int4.calibration import calibration, even_head_, quantize_gpt_
from leangpt.int4.quantize import quantize_
from leangpt.system.errors import UserError
from model import GPT, GPTConfig


def make(**options):
    torch.manual_seed(0)
    settings = dict(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=32)
    return GPT(GPTConfig(**(settings | options))).eval()


@pytest.mark.parametrize(
    "options", [dict(bias=True), dict(norm="rmsnorm"), dict(tie_embeddings=False)]
)
def test_an_evened_head_gives_the_same_logits(options):
    model = make(**options)
    with torch.no_grad():
        model.lm_head.weight[:, 3] *= 20
        model.lm_head.weight[:, 5] = 0
        for parameter in model.transformer.ln_f.parameters():
            parameter.add_(0.1 * torch.randn(32))
    idx = torch.randint(65, (2, 16))
    table = model.transformer.wte.weight.clone()
    want = model(idx)[0]
    assert even_head_(model) is model
    assert (model(idx)[0] - want).abs().max() < 1e-4 * want.abs().max()
    assert torch.equal(model.transformer.wte.weight, table)
    sizes = model.lm_head.weight.square().mean(0).sqrt()
    assert sizes[3] < 6 * sizes.median()


def test_calibration_runs_every_linear_on_its_own_text():
    model = make(n_layer=2)
    run = calibration(model, rows=3, tokens=10)
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, x, y, name=name: seen.append(name))
    run()
    assert len(seen) == 4 * 2 + 1 and len(set(seen)) == len(seen)


def test_calibration_on_a_given_text_shows_every_linear_all_of_it():
    model, given = make(n_layer=2), torch.randint(65, (2, 5))
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda m, x, y, name=name: shapes.update({name: tuple(x[0].shape[:2])})
            )
    calibration(model, text=given)()
    assert len(shapes) == 4 * 2 + 1 and set(shapes.values()) == {tuple(given.shape)}


def test_a_model_in_4_bits_and_a_group_that_does_not_fit_are_refused_untouched():
    model = make()
    with pytest.raises(UserError, match="group_size=64 does not divide the 32 inputs"):
        quantize_gpt_(model, 64)
    assert model.lm_head.weight is model.transformer.wte.weight
    quantize_gpt_(model, 32)
    with pytest.raises(UserError, match="in 4 bits already"):
        quantize_gpt_(model, 32)


def test_a_calibration_that_fails_leaves_the_model_as_it_was():
    model = make()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]

    def fails():
        model.transformer.h[0](torch.randn(1, 3, 32))
        raise OSError("half way")

    with pytest.raises(OSError, match="half way"):
        quantize_(model, 32, fails)
    assert [m for m in model.modules() if isinstance(m, torch.nn.Linear)] == linears
