"""GPT as a whole: shapes, policies that agree, caches, initialisation, refused settings."""

import pytest
import torch
from reference import relative_error
from torch.nn import functional as F

from leangpt.kv_cache.cache import build_cache
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

SMALL = dict(block_size=32, vocab_size=50, n_layer=2, n_head=4, n_embd=32)


def small(seed=0, **config):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **config}))


def tokens(B=2, T=32, seed=1):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed))


def test_forward_shapes_and_loss():
    model, idx = small(), tokens()
    logits, loss = model(idx)
    assert logits.shape == (2, 32, 50) and loss is None
    logits_none, loss = model(idx, idx)
    assert logits_none is None
    expected = F.cross_entropy(logits.flatten(0, 1), idx.flatten())
    assert abs(loss.item() - expected.item()) < 1e-6
    assert torch.allclose(model.last_logits(idx), logits[:, -1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    (
        dict(attention_policy="cache", q_chunk=8),
        dict(attention_policy="recompute", q_chunk=8),
        dict(attention_policy="recompute", q_chunk=5, k_chunk=3),
        dict(attention_policy="recompute", checkpoint_layers=True),
    ),
)
@pytest.mark.parametrize("position", ("learned", "rope", "none"))
def test_policies_share_weights_and_numbers(config, position):
    plain, tiled = small(position=position), small(position=position, **config)
    tiled.load_state_dict(plain.state_dict())
    idx = tokens()
    _, loss = plain(idx, idx)
    loss.backward()
    _, tiled_loss = tiled(idx, idx)
    tiled_loss.backward()
    assert abs(loss.item() - tiled_loss.item()) < 1e-6
    for a, b in zip(plain.parameters(), tiled.parameters()):
        assert relative_error(b.grad, a.grad) < 1e-5
    with torch.no_grad():
        assert torch.allclose(plain(idx)[0], tiled(idx)[0], atol=1e-5)
        assert abs(tiled(idx, idx)[1].item() - loss.item()) < 1e-6


@pytest.mark.parametrize(
    "policy,q_chunk", (("cache", None), ("cache", 5), ("grouped", None), ("recompute", 6))
)
@pytest.mark.parametrize("position", ("learned", "rope", "none"))
def test_cache_gives_the_full_forward_at_every_position(policy, q_chunk, position):
    model = small(attention_policy=policy, q_chunk=q_chunk, position=position).eval()
    idx = tokens()
    with torch.inference_mode():
        full, _ = model(idx)
        cache = build_cache(model.config, 2, 32)
        assert torch.allclose(model.prefill(idx[:, :17], cache), full[:, 16], atol=1e-5)
        for t in range(17, 32):
            step = model.decode_one_token(idx[:, t : t + 1], cache)
            assert torch.allclose(step, full[:, t], atol=1e-5)


def test_llama_shape():
    model = small(
        norm="rmsnorm", mlp="swiglu", position="rope", n_kv_head=2, n_inner=48, tie_embeddings=False
    )
    names = dict(model.named_parameters())
    assert names["transformer.h.0.mlp.c_fc.weight"].shape == (96, 32)
    assert names["transformer.h.0.attn.c_attn.weight"].shape == (64, 32)
    assert names["lm_head.weight"] is not names["transformer.wte.weight"]
    _, loss = model(tokens(), tokens())
    loss.backward()


def test_initialisation_is_gpt2s():
    model = small(n_layer=8, n_embd=128)
    assert abs(model.transformer.wte.weight.std().item() - 0.02) < 0.001
    assert abs(model.transformer.h[0].mlp.c_proj.weight.std().item() - 0.02 / 4) < 0.0005
    assert abs(small().num_params() + 32 * 32 - small().num_params(non_embedding=False)) == 0


def test_nanogpt_model_args_load():
    config = GPTConfig.from_dict(dict(SMALL, dropout=0.2, bias=False))
    assert config.kv_heads == 4
    with pytest.raises(UserError, match="n_experts"):
        GPTConfig.from_dict(dict(SMALL, n_experts=2))


@pytest.mark.parametrize(
    "settings,words",
    (
        (dict(n_head=3), "does not divide n_embd"),
        (dict(n_kv_head=3), "does not divide n_head"),
        (dict(n_layer=0), "positive"),
        (dict(q_chunk=0), "positive"),
        (dict(k_chunk=-4), "positive"),
        (dict(attention_policy="flash"), "unknown attention_policy"),
        (dict(position="alibi"), "unknown position"),
        (dict(norm="batch"), "unknown norm"),
        (dict(mlp="relu"), "unknown mlp"),
        (dict(dropout=1.0), "dropout"),
        (dict(k_chunk=4), "q_chunk too"),
        (dict(offload=True), "checkpoint_layers"),
        (dict(checkpoint_first=1), "checkpoint_layers"),
        (dict(checkpoint_layers=True, checkpoint_first=99), "1 to n_layer"),
        (dict(checkpoint_layers=True, checkpoint_first=0), "1 to n_layer"),
        (dict(attention_policy="grouped", n_kv_head=4), "smaller than n_head"),
        (dict(position="rope", n_embd=20), "even head size"),
    ),
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        GPTConfig(**{**SMALL, **settings})


def test_too_long_a_sequence_is_refused():
    with pytest.raises(UserError, match="block_size"):
        small()(tokens(T=33))
    small(position="rope")(tokens(T=33))


def test_crop_block_size():
    model, idx = small(), tokens(T=16)
    before, _ = model(idx)
    model.crop_block_size(16)
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(UserError):
        model.crop_block_size(17)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ("cache", "recompute"))
def test_torch_compile_gives_the_same_loss_and_gradients(policy):
    """The tiled block and the chunked loss are graph breaks; the rest is compiled around them."""
    model, idx = (
        small(attention_policy=policy, q_chunk=8 if policy == "recompute" else None),
        tokens(),
    )
    _, loss = model(idx, idx)
    loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    _, compiled = torch.compile(model, backend="aot_eager")(idx, idx)
    compiled.backward()
    assert abs(loss.item() - compiled.item()) < 1e-6
    for p, want in zip(model.parameters(), wanted):
        assert relative_error(p.grad, want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("heads", (1, pytest.param(4, marks=pytest.mark.campaign)))
def test_compiled_rows_give_the_same_loss_and_gradients(monkeypatch, heads):
    """One graph for all layers, of each way that tiles call a part."""
    monkeypatch.setattr("leangpt.attention.block_tiles.heads_at_once", lambda *_: heads)
    options = dict(attention_policy="recompute", q_chunk=8, k_chunk=5, position="rope")
    model, idx = small(n_layer=3, **options), tokens(T=29)
    expected = [model(idx, idx)[1]]
    expected += torch.autograd.grad(expected[0], list(model.parameters()))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_rows(backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            found = [model(idx, idx)[1]]
            found += torch.autograd.grad(found[0], list(model.parameters()))
    for a, b in zip(found, expected):
        assert relative_error(a, b) < 1e-5
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 4 <= graphs < 24  # "q", "kv", "qkv", finish; ragged tiles, some heads
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch.no_grad():
        assert torch.allclose(model(idx)[0][:, :28], model(idx[:, :28])[0], atol=1e-5)
