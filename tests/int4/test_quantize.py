"""Whole models in 4 bits: what is replaced, what it costs, how it is calibrated."""

import copy

import pytest
import torch
from int4_models import make_model, relative
from torch import nn

from leangpt.decoding.generate import generate
from leangpt.int4.calibration import quantize_gpt_
from leangpt.int4.quantize import quantize_, storage_bits
from leangpt.layers.int4_linear import Int4Linear
from leangpt.system.errors import UserError


@pytest.mark.parametrize("group_size,bits", [(32, 5.0), (64, 4.5), (128, 4.25)])
def test_storage_from_the_real_tensors(group_size, bits):
    model = quantize_(make_model(n_embd=128), group_size)
    assert storage_bits(model) == bits
    float_bytes = sum(p.numel() for n, p in model.named_parameters() if "wte" not in n)
    held = sum(
        t.numel() * t.element_size()
        for m in model.modules()
        if isinstance(m, Int4Linear)
        for t in m.__dict__["_buffers"].values()
        if t is not None
    )
    weights = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, Int4Linear)
    )
    assert held == weights * bits / 8 and float_bytes < weights / 8  # no second copy, no float
    with pytest.raises(UserError, match="no int4 layers"):
        storage_bits(make_model())


def test_quantize_replaces_every_linear_and_leaves_lookup_exact():
    model = make_model()
    wte = model.transformer.wte.weight.clone()
    same = quantize_gpt_(model, 32)
    assert same is model
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert isinstance(model.lm_head, Int4Linear)
    assert torch.equal(model.transformer.wte.weight, wte)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cache", "recompute"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_quantised_model_decodes_what_it_forwards(policy, position):
    model = quantize_gpt_(make_model(position=position, attention_policy=policy), 32)
    idx = torch.randint(65, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = generate(model, idx, 12, temperature=0)
        logits, _ = model(text[:, :-1])
    chosen = logits[:, 8:].gather(-1, text[:, 9:, None]).squeeze(-1)
    assert (logits[:, 8:].amax(-1) - chosen).max() < 0.02  # bf16 activations may swap near ties


def test_calibration_ends_with_the_last_linear():
    """By then all is known; the logits of a whole text would be the largest thing in memory."""
    model, reached = make_model(), []
    idx = torch.randint(65, (2, 9))

    def run():
        model(idx)
        reached.append(True)

    quantize_(model, 32, run)
    assert isinstance(model.lm_head, Int4Linear) and not reached
    quantize_(model, 32, run)  # nothing left to round: runs to its end
    assert reached


@pytest.mark.slow
def test_calibrated_rounding_moves_the_logits_less():
    model = make_model(n_embd=128, n_layer=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    idx = torch.randint(65, (40, 32), generator=torch.Generator().manual_seed(0))

    def rounded(model, calibrated):
        model = copy.deepcopy(model)
        return quantize_gpt_(model, 32) if calibrated else quantize_(model, 32)

    with torch.no_grad():
        want = model(idx)[0]
        errors = [relative(rounded(model, c)(idx)[0], want) for c in (False, True)]
    assert errors[1] < 0.8 * errors[0], errors


def test_errors():
    with pytest.raises(UserError, match="group_size=48"):
        quantize_(make_model(), 48)
    model = make_model(n_embd=48)
    with pytest.raises(UserError, match="does not divide the 48 inputs of transformer.h.0.attn"):
        quantize_(model, 32)
    assert isinstance(model.lm_head, nn.Linear)  # nothing was touched
