"""Hugging Face models with tiled layers against the same models as they are."""

import copy
import warnings

import pytest
import torch
import transformers
from reference import relative_error
from torch import nn

from leangpt.attention import RecomputedRows, StoredRows, block_tiles, tile_layers
from leangpt.memory.meter import measure_peak
from leangpt.system.errors import UserError

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
FAMILIES = {
    "Llama": dict(attention_bias=True),
    "Mistral": dict(sliding_window=None, head_dim=12),  # heads together wider than the stream
    "Qwen2": {},  # biases of q, k and v
    "Qwen3": dict(head_dim=16),  # norms of queries and keys
}


def make(family="Llama", dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    for p in model.parameters():  # far from uniform attention; biases and norms of use
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    return model.train()


def tokens(B=3, T=23):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model, idx, **inputs):
    out = model(idx, labels=idx, **inputs)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
    return out, dict(zip(names, torch.autograd.grad(out.loss, parameters)))


def assert_same(model, tiled, idx, tolerance, **inputs):
    (expected, wanted), (out, found) = (
        loss_and_gradients(m, idx, **inputs) for m in (model, tiled)
    )
    assert relative_error(out.logits, expected.logits) < tolerance
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        assert relative_error(grad, wanted[name]) < tolerance, name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpoint_layers", (True, False))
@pytest.mark.parametrize("source", (RecomputedRows, StoredRows))
@pytest.mark.parametrize("heads", (1, 2))
def test_outputs_and_gradients_are_the_originals(
    monkeypatch, family, checkpoint_layers, source, heads
):
    monkeypatch.setattr(block_tiles, "heads_at_once", lambda *_: heads)
    model = make(family)
    tiled = copy.deepcopy(model)
    options = dict(source=source, checkpoint_layers=checkpoint_layers)
    assert tile_layers(tiled, q_chunk=7, k_chunk=5, **options) is tiled
    # the norms go through float32 in float64 models too, and round there
    assert_same(model, tiled, tokens(), 1e-5)
    assert list(tiled.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        logits = tiled.eval()(tokens(), use_cache=False).logits
        assert relative_error(logits, model.eval()(tokens()).logits) < 1e-5


@pytest.mark.slow
def test_float32_and_bfloat16():
    model = make(dtype=torch.float32)
    tiled = tile_layers(copy.deepcopy(model), q_chunk=8)
    assert_same(model, tiled, tokens(), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        out, found = loss_and_gradients(tiled, tokens())
    expected, wanted = loss_and_gradients(model, tokens())
    assert relative_error(out.logits, expected.logits) < 0.1
    assert all(grad.dtype == torch.float32 for grad in found.values())


def count_tiles(monkeypatch):
    """A list that grows by one entry a block run by tiles."""
    calls, run = [], block_tiles.forward_tiles
    monkeypatch.setattr(block_tiles, "forward_tiles", lambda *a: calls.append(1) or run(*a))
    return calls


def test_training_is_tiled_though_a_cache_is_the_default(monkeypatch):
    model, calls = tile_layers(make(), q_chunk=8), count_tiles(monkeypatch)
    assert model.config.use_cache
    model(tokens()).logits.sum().backward()
    assert len(calls) == 2


@pytest.mark.slow
def test_deepcopy_and_adapters(monkeypatch):
    """A copy tiles its own layers; frozen weights and wrapped linears as LoRA has them."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.lora_A = nn.Linear(base.in_features, 2, bias=False).double()
            self.lora_B = nn.Linear(2, base.out_features, bias=False).double()

        def forward(self, x):
            return self.base(x) + self.lora_B(self.lora_A(x))

    monkeypatch.setattr(block_tiles, "heads_at_once", lambda *_: 1)
    model = make().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    twin = tile_layers(copy.deepcopy(model), q_chunk=7)
    tiled = copy.deepcopy(twin)
    nn.init.zeros_(twin.model.layers[0].mlp.up_proj.weight)
    assert_same(model, tiled, tokens(), 1e-5)
    _, found = loss_and_gradients(tiled, tokens())
    assert len(found) == 4 and all("lora" in name for name in found)


def test_padding_runs_the_layers_as_they_were(monkeypatch):
    model = make()
    tiled, calls = tile_layers(copy.deepcopy(model), q_chunk=8), count_tiles(monkeypatch)
    mask = torch.ones(3, 23, dtype=torch.int64)
    assert_same(model, tiled, tokens(), 1e-5, attention_mask=mask)  # of ones: none
    assert len(calls) == 2
    mask[0, 20:] = 0
    with pytest.warns(UserWarning, match="an attention mask: the layers run untiled"):
        assert_same(model, tiled, tokens(), 1e-12, attention_mask=mask)
    assert len(calls) == 2


def test_packed_sequences_are_not_tiled():
    model = make()
    tiled = tile_layers(copy.deepcopy(model), q_chunk=8)
    positions = torch.cat((torch.arange(10), torch.arange(13))).repeat(3, 1)
    with pytest.warns(UserWarning, match="untiled"):
        assert_same(model, tiled, tokens(), 1e-12, position_ids=positions)


@torch.no_grad()
def test_generation_is_the_originals():
    model = make().eval()
    tiled = tile_layers(copy.deepcopy(model), q_chunk=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = [m.generate(tokens(), max_new_tokens=5, do_sample=False) for m in (model, tiled)]
    assert torch.equal(*texts)


def test_eager_attention_no_longer_builds_its_mask(monkeypatch):
    model = make(attn_implementation="eager")
    tiled, calls = tile_layers(copy.deepcopy(model), q_chunk=8), count_tiles(monkeypatch)
    assert_same(model, tiled, tokens(), 1e-5)
    assert len(calls) == 2


def test_what_cannot_be_tiled_is_named():
    with pytest.raises(UserError, match="Linear has no layers that can be tiled"):
        tile_layers(nn.Linear(2, 2))
    with pytest.raises(UserError, match="sliding window of 8"):
        tile_layers(make("Mistral", sliding_window=8))
    window = dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(UserError, match="sliding window of 8"):
        tile_layers(make("Qwen2", **window))
    tile_layers(make("Qwen2", **window | dict(use_sliding_window=False)))
    scaled = make()
    scaled.model.layers[1].self_attn.scaling = 0.5
    with pytest.raises(UserError, match="attention scaled by 0.5"):
        tile_layers(scaled)
    with pytest.raises(UserError, match="attention_dropout=0"):
        tile_layers(make(attention_dropout=0.1), q_chunk=8)(tokens())


@pytest.mark.slow
def test_training_peak_is_far_below_the_originals_and_its_checkpointings():
    """Four layers of 64 channels, 2,048 tokens: the stream of each layer, and a tile."""
    sizes = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=4)
    model = make(dtype=torch.float32, max_position_embeddings=2048, **sizes)
    idx = tokens(1, 2048)

    def peak(model):
        def step():
            model.zero_grad(set_to_none=True)
            model.model(idx).last_hidden_state.sum().backward()

        step()
        return measure_peak(step)

    original, tiled = peak(model), peak(tile_layers(copy.deepcopy(model), q_chunk=256))
    model.gradient_checkpointing_enable()
    checkpointed = peak(model)
    stream, gradients = 2048 * 64 * 4, 4 * sum(p.numel() for p in model.model.layers.parameters())
    # each thread of the attention kernel works in 125 KB of its own, whatever the model's size
    tiled -= torch.get_num_threads() * 125_440
    assert tiled < checkpointed / 2 and tiled < original / 8
    assert tiled < 8 * stream + 2 * gradients
