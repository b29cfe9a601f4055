"""Optimizers of others in train.py's loop: the groups they get, and Muon in 8 bits."""

from types import SimpleNamespace

import pytest
import torch

from experiments.optimizers.peers import state_bytes_of
from experiments.scale.foreign import FOREIGN, groups_of
from experiments.scale.muon_8bit import BLOCK, Muon8bit, dequantized, quantized
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

SETTINGS = SimpleNamespace(
    learning_rate=2e-3, embedding_lr=4e-3, weight_decay=0.1, beta1=None, beta2=0.95
)


def small_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=64))


def test_groups_hold_every_parameter_once():
    model = small_model()
    linear, rest = groups_of(SETTINGS, model)
    held = [p for group in [*linear, *rest] for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in [*linear, *rest]} == {
        "linear": (2e-3, 0.1),
        "embedding": (4e-3, 0.1),
        "vector": (4e-3, 0.0),
    }
    with pytest.raises(UserError, match="give --learning_rate and --embedding_lr"):
        groups_of(SimpleNamespace(learning_rate=None, embedding_lr=1e-3), model)


@pytest.mark.parametrize("name", ["torch_muon", "muon_8bit", "soap"])
def test_a_foreign_optimizer_follows_its_rates(name):
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = FOREIGN[name](SETTINGS, model, None)
    x = torch.randint(64, (2, 8))
    for _ in range(3):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        model(x, x)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.equal(old) for p, old in zip(model.parameters(), before))
    assert set(optimizer.state) == set(model.parameters())
    still = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model(x, x)[1].backward()
    optimizer.step()
    assert all(p.equal(old) for p, old in zip(model.parameters(), still))


def test_quantized_momentum_is_within_half_a_code():
    momentum = torch.randn(3, BLOCK)
    momentum[1] *= 1e-6
    codes, scales = quantized(momentum)
    assert codes.dtype == torch.int8 and codes.shape == (3 * BLOCK,) and scales.shape == (3,)
    error = (dequantized(codes, scales, momentum) - momentum).abs()
    assert (error <= 0.5001 * scales[:, None]).all()
    zeros = torch.zeros(10, 10)
    assert dequantized(*quantized(zeros), zeros).equal(zeros)


def test_muon_in_8_bits_is_torchs_muon_up_to_rounding():
    weights = [torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    one, other = (torch.nn.Parameter(weight) for weight in weights)
    plain = torch.optim.Muon([one], lr=1e-2, adjust_lr_fn="match_rms_adamw")
    eight = Muon8bit([other], lr=1e-2, adjust_lr_fn="match_rms_adamw")
    start = one.detach().clone()
    for seed in range(5):
        gradient = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
        one.grad, other.grad = gradient.clone(), gradient.clone()
        plain.step()
        eight.step()
        if seed == 0:
            assert other.equal(one)  # nothing has been rounded yet
    moved = (one - start).norm()
    assert 0 < (one - other).norm() < 0.02 * moved
    assert state_bytes_of([eight]) == 64 * 32 + 4 and "momentum_buffer" not in eight.state[other]
