"""The protocol suffices: a block that knows nothing of ours but the names in it."""

from types import SimpleNamespace

import pytest
import torch
from reference import relative_error, softmax_attention
from torch import nn

from leangpt.attention import RecomputedRows, StoredRows, run_tiles


class Parallel(nn.Module):
    """Attention and MLP side by side; heads wider together than the stream."""

    attention_dropout = residual_dropout = 0.0
    offload = compiled = None

    def __init__(self, **config):
        super().__init__()
        shape = dict(n_embd=12, n_head=4, kv_heads=2, head_dim=5, q_chunk=None, k_chunk=None)
        self.config = SimpleNamespace(**shape | config)
        self.norm = nn.LayerNorm(12)
        self.q, self.v = nn.Linear(12, 20), nn.Linear(12, 10)
        self.k = nn.Linear(12, 10, bias=False)  # a bias falls out of the softmax
        self.out, self.mlp = nn.Linear(20, 12), nn.Linear(12, 12)

    def project(self, x, positions, parts="qkv", heads=None):
        x = self.norm(x) + 0.1 * positions[:, None]
        found = {p: getattr(self, p)(x).unflatten(-1, (-1, 5)).transpose(1, 2) for p in parts}
        first, stop = heads or (0, 2)
        spans = {"q": slice(2 * first, 2 * stop), "k": slice(first, stop), "v": slice(first, stop)}
        return tuple(found[part][:, spans[part]] for part in parts)

    def finish(self, x, y):
        return x + self.out(y.transpose(1, 2).flatten(2)) + self.mlp(self.norm(x)).tanh()

    def plain(self, x):
        return self.finish(x, softmax_attention(*self.project(x, torch.arange(x.size(1)))))


@pytest.mark.slow
@pytest.mark.parametrize("source", (RecomputedRows, StoredRows))
@pytest.mark.parametrize("checkpoint_layers", (False, True))
@pytest.mark.parametrize("heads", (1, 2))
def test_a_block_of_somebody_else(monkeypatch, source, checkpoint_layers, heads):
    monkeypatch.setattr("leangpt.attention.block_tiles.heads_at_once", lambda *_: heads)
    torch.manual_seed(0)
    block = Parallel(source=source, checkpoint_layers=checkpoint_layers).double()
    x = torch.randn(3, 19, 12, dtype=torch.float64, requires_grad=True)
    inputs, grad = [x, *block.parameters()], torch.randn_like(x)
    expected, out = block.plain(x), run_tiles(block, x, (6, 4))
    assert relative_error(out, expected) < 1e-12
    for a, b in zip(*(torch.autograd.grad(y, inputs, grad) for y in (out, expected))):
        assert relative_error(a, b) < 1e-10
    with torch.no_grad():
        again = x.clone()
        assert run_tiles(block, again, (6, 4), inplace=True) is again
        assert relative_error(again, expected) < 1e-12
