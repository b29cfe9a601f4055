"""Blocks under every policy against a plain block in float64: numbers, gradients, peaks."""

import pytest
import torch
from reference import plain_block, relative_error

from leangpt.attention import block_tiles
from leangpt.attention.block_backward import same_product
from leangpt.attention.protocol import RowParts
from leangpt.memory.meter import measure_peak
from leangpt.system.errors import UserError
from model import GPT, Block, GPTConfig


def block_pair(dtype, T, seed=0, **config):
    """A Block under a policy, and its float64 twin for the reference."""
    torch.manual_seed(seed)
    config = GPTConfig(block_size=64, n_layer=2, n_head=4, n_embd=32, bias=True, **config)
    twin = Block(config).double()
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block = Block(config).to(dtype)
    block.load_state_dict(twin.state_dict())
    return block, twin


POLICIES = [  # policy, key/value heads, q_chunk, k_chunk
    ("cache", 4, None, None),
    ("cache", 4, 7, None),
    ("cache", 4, 7, 5),
    ("cache", 4, 99, None),
    ("grouped", 2, None, None),
    ("grouped", 1, 8, 3),
    ("grouped", 2, 6, None),
    ("recompute", 4, None, None),
    ("recompute", 4, 8, 8),
    ("recompute", 2, 7, 5),
    ("recompute", 1, 5, 16),
    ("recompute", 4, 99, 99),
    ("recompute", 4, 1, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("policy,G,q_chunk,k_chunk", POLICIES)
@pytest.mark.parametrize("B,T", ((1, 1), (1, 8), (3, 23)))
@pytest.mark.parametrize("dtype,tolerance", ((torch.float64, 1e-10), (torch.float32, 1e-5)))
@pytest.mark.parametrize("checkpoint_layers", (False, True))
def test_policy_is_exact_forward_and_backward(
    policy, G, q_chunk, k_chunk, B, T, dtype, tolerance, checkpoint_layers
):
    block, twin = block_pair(
        dtype,
        T,
        attention_policy=policy,
        n_kv_head=G,
        q_chunk=q_chunk,
        k_chunk=k_chunk,
        position="rope",
        checkpoint_layers=checkpoint_layers,
    )
    x = torch.randn(B, T, 32, dtype=torch.float64)
    wide, narrow = x.clone().requires_grad_(), x.to(dtype).requires_grad_()
    expected = plain_block(twin, wide)
    grad = torch.randn_like(expected)
    expected.backward(grad)

    out = block(narrow)
    out.backward(grad.to(dtype))
    assert relative_error(out, expected) < tolerance
    assert relative_error(narrow.grad, wide.grad) < tolerance
    for found, wanted in zip(block.parameters(), twin.parameters()):
        assert relative_error(found.grad, wanted.grad) < tolerance

    with torch.no_grad():
        kept = narrow.detach().clone()
        assert relative_error(block(kept), expected) < tolerance
        assert torch.equal(kept, narrow.detach())  # not overwritten unless asked
        assert relative_error(block(kept, inplace=True), expected) < tolerance


@pytest.mark.parametrize("heads", (1, 2, 4))
@pytest.mark.parametrize("policy,G", (("cache", 4), ("recompute", 4), ("recompute", 2)))
@pytest.mark.parametrize("checkpoint_layers", (False, True))
def test_backward_of_a_few_heads_at_a_time(monkeypatch, heads, policy, G, checkpoint_layers):
    monkeypatch.setattr(block_tiles, "heads_at_once", lambda *_: min(heads, G))
    block, twin = block_pair(
        torch.float64,
        23,
        attention_policy=policy,
        n_kv_head=G,
        q_chunk=7,
        k_chunk=5,
        position="rope",
        checkpoint_layers=checkpoint_layers,
    )
    x = torch.randn(2, 23, 32, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    grad = torch.randn_like(x)
    expected = torch.autograd.grad(plain_block(twin, x), [x, *twin.parameters()], grad)
    out = block(x)
    for _ in range(2):  # the second time without the output that the first wrote over
        found = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        assert max(relative_error(a, b) for a, b in zip(found, expected)) < 1e-10


@pytest.mark.parametrize("scale", (1.0, 1e-30, 1e30))
def test_a_multiple_of_the_gradient_stands_for_the_output(scale):
    torch.manual_seed(0)
    grad, out = torch.randn(2, 1, 3, 50, 16)
    grad[:, :, 0] = 0
    grad *= scale
    stand_in = same_product(grad, out)[..., None] * grad
    found = (stand_in.double() * grad.double()).sum(-1)
    expected = (out.double() * grad.double()).sum(-1)
    assert stand_in.isfinite().all()
    assert relative_error(found, expected) < 1e-6


def test_small_gradients_in_float16_stay_finite():
    """The multiple of a gradient that stands for the output is beyond float16's range there."""

    def weight_gradient(dtype):
        torch.manual_seed(0)
        block = Block(
            GPTConfig(
                block_size=64,
                vocab_size=8,
                n_layer=1,
                n_head=2,
                n_embd=32,
                attention_policy="recompute",
                q_chunk=16,
                k_chunk=16,
                position="none",
            )
        ).to(dtype)
        x = torch.randn(1, 64, 32).to(dtype).requires_grad_()
        block(x).backward(4e-6 * torch.randn(1, 64, 32).to(dtype))
        return block.attn.c_attn.weight.grad

    assert relative_error(weight_gradient(torch.float16), weight_gradient(torch.float32)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("heads", (1, 2, 4))
def test_gradcheck_of_the_tiled_block(monkeypatch, heads):
    """The output is a random projection, to keep the Jacobian small."""
    monkeypatch.setattr(block_tiles, "heads_at_once", lambda *_: heads)
    block, _ = block_pair(
        torch.float64, 4, attention_policy="recompute", n_kv_head=4, q_chunk=2, k_chunk=3
    )
    x = torch.randn(2, 4, 32, dtype=torch.float64, requires_grad=True)
    sketch = torch.randn(3, x.numel(), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sketch @ block(x).flatten(), (x,), atol=1e-7)


def test_frozen_weights_get_no_gradient():
    block, _ = block_pair(torch.float32, 9, attention_policy="recompute", q_chunk=4)
    block.mlp.requires_grad_(False)
    block(torch.randn(1, 9, 32)).sum().backward()
    assert block.mlp.c_fc.weight.grad is None and block.attn.c_attn.weight.grad is not None


@pytest.mark.parametrize("policy", ("cache", "recompute"))
def test_autocast_tiles_stay_near_float32(policy):
    block, twin = block_pair(torch.float32, 30, attention_policy=policy, q_chunk=8, k_chunk=8)
    x = torch.randn(2, 30, 32)
    expected = plain_block(twin, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x.bfloat16().requires_grad_())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert relative_error(y, expected) < 2e-2
    assert block.attn.c_attn.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("recorded", [True, False])
def test_autocast_keeps_no_copies_of_tiled_weights(recorded):
    """It would keep those of all layers until the whole model is through: 3.1 MB here."""
    config = GPTConfig(block_size=64, vocab_size=64, n_layer=8, n_head=4, n_embd=128, q_chunk=16)
    model, idx = GPT(config), torch.randint(64, (1, 64))

    def forward():
        with torch.set_grad_enabled(recorded), torch.autocast("cpu", torch.bfloat16):
            model(idx, idx)

    forward()
    assert measure_peak(forward) < 1.5e6


@pytest.mark.parametrize("G", (1, 4))
def test_autocast_without_tiles_stays_near_float32(G):
    block, twin = block_pair(torch.float32, 30, n_kv_head=G)
    x = torch.randn(2, 30, 32)
    wide, narrow = x.double().requires_grad_(), x.bfloat16().requires_grad_()
    expected = plain_block(twin, wide)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(narrow)
    y.backward(grad.bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 2e-2 and relative_error(narrow.grad, wide.grad) < 2e-2
    for found, wanted in zip(block.parameters(), twin.parameters()):
        assert found.grad.dtype == torch.float32
        assert relative_error(found.grad, wanted.grad) < 3e-2


def test_residual_dropout_is_replayed_exactly():
    """The backward sees the forward's masks: its gradient is that of the very output it gave."""
    block, _ = block_pair(
        torch.float64,
        9,
        attention_policy="recompute",
        q_chunk=4,
        dropout=0.5,
        attention_dropout=0.0,
    )
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)

    def run(shift):
        torch.manual_seed(5)
        return block(x + shift * direction)

    weights = torch.randn(2, 9, 32, dtype=torch.float64)
    (grad,) = torch.autograd.grad((run(0.0) * weights).sum(), x)
    numeric = ((run(1e-6) - run(-1e-6)).detach() * weights).sum() / 2e-6
    assert abs(float((grad * direction).sum() - numeric)) < 1e-5 * abs(float(numeric))
    torch.manual_seed(6)
    assert not torch.equal(block(x), run(0.0))  # dropout was on


def test_attention_dropout_under_tiles_is_refused():
    block, _ = block_pair(torch.float32, 8, attention_policy="recompute", q_chunk=8, dropout=0.1)
    with pytest.raises(UserError, match="attention_dropout=0"):
        block(torch.randn(1, 8, 32))
    block.eval()(torch.randn(1, 8, 32))


def peak_beyond_input(T, backward=False, **config):
    """Bytes a block over T rows takes beyond its weights, its input and its output."""
    block = Block(GPTConfig(**{"block_size": T, "n_head": 4, "n_embd": 64, **config}))
    x, grad = torch.randn(2, 1, T, block.config.n_embd)
    if not backward:
        with torch.inference_mode():
            block(x.clone(), inplace=True)
            return measure_peak(lambda: block(x, inplace=True))
    x.requires_grad_()
    return measure_peak(lambda: torch.autograd.grad(block(x), [x, *block.parameters()], grad))


@pytest.mark.slow
def test_recompute_peak_does_not_grow_with_length():
    """The promise: doubling T moves the peak beyond input by less than 5%."""
    config = dict(attention_policy="recompute", q_chunk=128, k_chunk=128)
    short, long = peak_beyond_input(1024, **config), peak_beyond_input(2048, **config)
    assert abs(long - short) < 0.05 * short
    plain = peak_beyond_input(2048)
    assert long < plain / 10


@pytest.mark.slow
@pytest.mark.parametrize("heads,rows", ((1, 3.5), (2, 4), (4, 4)))
def test_training_peak_grows_by_few_rows(monkeypatch, heads, rows):
    """Backward: the output, attention's output (then its gradient) and dx; of the heads taken at
    once dq and, unless they are all, the queries; two numbers per row and head (logsumexp and
    multiple). That is 3.5 to 4 numbers per row and channel where the plain block keeps 18."""
    monkeypatch.setattr(block_tiles, "heads_at_once", lambda *_: heads)
    config = dict(backward=True, attention_policy="recompute", q_chunk=128, k_chunk=128)
    growth = peak_beyond_input(4096, **config) - peak_beyond_input(2048, **config)
    unit = 2048 * 64 * 4
    assert growth < (rows + 2 * 4 / 64 + 0.05) * unit
    plain = peak_beyond_input(4096, backward=True) - peak_beyond_input(2048, backward=True)
    assert plain > 15 * unit


@pytest.mark.slow
def test_backward_of_a_long_sequence_takes_a_quarter_of_plain_memory():
    """Rows of 256 channels and 8 heads, as in the README's table, here of 32 tiles; one layer."""
    config = dict(n_head=8, n_embd=256, backward=True)
    plain = peak_beyond_input(4096, **config)
    assert (
        peak_beyond_input(4096, attention_policy="recompute", q_chunk=128, k_chunk=128, **config)
        < plain / 4
    )


@pytest.mark.slow
@pytest.mark.parametrize("compiled", (False, True))
def test_checkpointed_whole_sequences(monkeypatch, compiled):
    """As a CUDA device does it: no tiles where one would hold whole sequences."""
    monkeypatch.setattr(block_tiles, "few_launches", lambda device, training: training)
    block, twin = block_pair(
        torch.float64,
        9,
        attention_policy="recompute",
        q_chunk=20,
        k_chunk=4,
        checkpoint_layers=True,
        dropout=0.5,
        attention_dropout=0.0,
    )
    if compiled:
        plain = torch.compile(block.plain, backend="aot_eager")
        block.compiled = RowParts(block.project, block.finish, plain)
    x = torch.randn(5, 9, 32, dtype=torch.float64, requires_grad=True)  # 2 + 2 + 1 sequences
    block.train()
    torch.manual_seed(1)
    out = block(x)
    found = torch.autograd.grad(out, [x, *block.parameters()], torch.ones_like(out))
    torch.manual_seed(1)
    again = block(x)
    assert torch.equal(out, again) and not torch.equal(out, block(x))  # dropout is on, and seeded
    replayed = torch.autograd.grad(again, [x, *block.parameters()], torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(found, replayed))
    step = 1e-6 * torch.randn_like(x)
    torch.manual_seed(1)
    rise = (block(x + step) - out).sum()  # the same elements were dropped going back
    assert relative_error(rise, (found[0] * step).sum()) < 1e-4

    block.eval()
    grad = torch.randn_like(x)
    expected = torch.autograd.grad(plain_block(twin, x), [x, *twin.parameters()], grad)
    found = torch.autograd.grad(block(x), [x, *block.parameters()], grad)
    assert max(relative_error(a, b) for a, b in zip(found, expected)) < 1e-10


@pytest.mark.parametrize("first", (1, 2, 3))
def test_some_layers_checkpointed_are_the_same_model(first):
    """checkpoint_first: gradients of all layers checkpointed, whatever the number."""
    grads = []
    for checkpoint_first in (None, first):
        torch.manual_seed(0)
        shape = dict(n_layer=3, n_head=2, n_embd=32, block_size=48, vocab_size=64)
        shape |= dict(checkpoint_layers=True, q_chunk=16, checkpoint_first=checkpoint_first)
        model = GPT(GPTConfig(**shape)).double()
        idx = torch.randint(64, (2, 49), generator=torch.Generator().manual_seed(1))
        model(idx[:, :-1], idx[:, 1:].contiguous())[1].backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    kept = [block.config.checkpoint_layers for block in model.transformer.h]
    assert kept == [True] * first + [False] * (3 - first)
