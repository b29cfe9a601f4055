"""Every cache gives the logits of a full forward, at every position, for every policy."""

import copy

import pytest
import torch
from torch.nn import functional as F

from leangpt.attention.kv_source import attend
from leangpt.kv_cache import cache_triton
from leangpt.kv_cache.cache import build_cache
from leangpt.kv_cache.rows import RECENT
from leangpt.layers.rope import apply_rope, rope_table
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

POLICIES = [("cache", None), ("grouped", 2), ("recompute", None), ("recompute", 2)]


def make(policy="cache", n_kv_head=None, seed=0, **options):
    torch.manual_seed(seed)
    settings = dict(block_size=40, vocab_size=61, n_layer=2, n_head=4, n_embd=32, bias=True)
    config = GPTConfig(**(settings | options), attention_policy=policy, n_kv_head=n_kv_head)
    model = GPT(config).eval()
    with torch.no_grad():  # large enough that attention is far from uniform, biases not zero
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if "attn" in name else 0.05))
    return model


def tokens(model, B, T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (B, T), generator=generator)


def decode(model, idx, cache, first, prepare=None):
    """Prefill `first` tokens, then one by one: logits (B, T - first + 1, V) from first - 1 on."""
    logits = [model.prefill(idx[:, :first], cache)]
    cache.fixed_shapes = prepare == "fixed"
    for i in range(first, idx.size(1)):
        logits.append(model.decode_one_token(idx[:, i : i + 1], cache))
    return torch.stack(logits, dim=1)


@torch.no_grad()
def windowed_forward(model, idx, window):
    """The full forward with attention to the newest `window` tokens only: what rolling means."""
    T = idx.size(1)
    positions = torch.arange(T)
    age = positions[:, None] - positions
    mask = (age >= 0) & (age < window)
    x = model.transformer.wte(idx)
    for block in model.transformer.h:
        q, k, v = block.project(x, positions)
        g = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
        x = block.finish(x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    return model.lm_head(model.transformer.ln_f(x))


@torch.no_grad()
@pytest.mark.parametrize("shapes", ["host", "fixed"])
@pytest.mark.parametrize("position", ["learned", "rope", "none"])
@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
def test_logits_equal_the_full_forward(policy, n_kv_head, position, shapes):
    model = make(policy, n_kv_head, position=position)
    idx = tokens(model, 3, 33)
    full, _ = model(idx)
    cache = build_cache(model.config, 3, 40)
    got = decode(model, idx, cache, 7, shapes)
    torch.testing.assert_close(got, full[:, 6:], atol=1e-5, rtol=0)
    assert cache.length == 33 and cache.positions.tolist() == [33] * 3


@torch.no_grad()
@pytest.mark.parametrize("shapes", ["host", "fixed"])
@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
@pytest.mark.parametrize("position", ["rope", "none"])
def test_rolls_past_its_end(policy, n_kv_head, position, shapes):
    model = make(policy, n_kv_head, position=position, block_size=64)
    idx = tokens(model, 2, 47)
    want = windowed_forward(model, idx, 12)
    got = decode(model, idx, build_cache(model.config, 2, 12), 5, shapes)
    torch.testing.assert_close(got, want[:, 4:], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_rows_of_unequal_length(policy, n_kv_head, position, kv_bits):
    model = make(policy, n_kv_head, position=position)
    lengths = torch.tensor([3, 9, 6])
    idx = tokens(model, 3, 25)
    cache = build_cache(model.config, 3, 40, kv_bits=kv_bits)
    padded = idx[:, :9].clone()
    for b, n in enumerate(lengths):
        padded[b, n:] = 0
    got = [model.prefill(padded, cache, lengths=lengths)]
    for step in range(16):
        now = idx[torch.arange(3), lengths + step][:, None]
        got.append(model.decode_one_token(now, cache))
    got = torch.stack(got, dim=1)  # (B, 17, V)
    full, _ = model(idx)
    for b, n in enumerate(lengths):
        error = (got[b] - full[b, n - 1 : n + 16]).abs().max()
        assert error < (1e-5 if kv_bits is None else 0.2), (b, error)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["cache", "recompute"])
def test_tiles_stored_in_any_order(policy):
    """A tiled prefill stores rows last tile first, a slice of the batch at a time."""
    model = make(policy, position="rope")
    attn = model.transformer.h[0].attn
    x = torch.randn(2, 31, 32)
    caches = [build_cache(model.config, 2, 40, kv_bits=bits) for bits in (4, 4, None, None)]
    for number, cache in enumerate(caches):
        layer, step = cache.layers[0], cache.begin(30)
        k, v = attn.project(x[:, :30], step.positions, "kv")
        if number % 2:
            for start, stop in ((20, 30), (10, 20), (0, 10)):
                for b in (slice(1, 2), slice(0, 1)):
                    rows = [x[b, start:stop], k[b, :, start:stop], v[b, :, start:stop]]
                    layer.store(step, *rows, start=start, batch=b)
        else:
            layer.store(step, x[:, :30], k, v)
        cache.advance(30)
        step, new = cache.begin(1), x[:, 30:]
        cache.out = layer.attend_new(
            step, new, attn, *attn.project(new, step.positions, layer.parts)
        )
    assert torch.equal(caches[0].out, caches[1].out)
    assert torch.equal(caches[2].out, caches[3].out)


@torch.no_grad()
@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
def test_many_new_tokens_see_the_past_and_each_other(policy, n_kv_head):
    """Seven after ten, in one step, are the last seven of seventeen."""
    attn = make(policy, n_kv_head).transformer.h[0].attn
    x = torch.randn(2, 17, 32)
    cache = build_cache(attn.config, 2, 40)
    layer = cache.layers[0]
    for count in (10, 7):
        step = cache.begin(count)
        rows = x[:, cache.length : cache.length + count]
        out = layer.attend_new(step, rows, attn, *attn.project(rows, step.positions, layer.parts))
        cache.advance(count)
    whole = attend(*attn.project(x, torch.arange(17)))
    torch.testing.assert_close(out, whole[:, :, 10:], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
def test_small_tiles_merge_exactly(policy, n_kv_head, position):
    """From the same stored codes in each step; test_a_quantised_step_is_the_same_in_either_shapes
    says why."""
    model = make(policy, n_kv_head, position=position)
    idx = tokens(model, 2, 30)
    cache = build_cache(model.config, 2, 40, kv_bits=8)
    model.prefill(idx[:, :4], cache)
    for i in range(4, 30):
        tiled = copy.deepcopy(cache)
        for layer in tiled.layers:
            layer.tile = 7
        want, got = (model.decode_one_token(idx[:, i : i + 1], each) for each in (cache, tiled))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
@pytest.mark.parametrize("bits,limit", [(8, 0.02), (4, 0.3)])
@pytest.mark.parametrize("shapes", ["host", "fixed"])
def test_quantised_rows_are_close_and_the_newest_exact(policy, n_kv_head, bits, limit, shapes):
    model = make(policy, n_kv_head)
    idx = tokens(model, 2, 40)
    full, _ = model(idx)
    got = decode(model, idx, build_cache(model.config, 2, 40, kv_bits=bits), 4, shapes)
    exact = RECENT - 3  # until then nothing is older than the exact ring
    torch.testing.assert_close(got[:, :exact], full[:, 3 : 3 + exact], atol=1e-5, rtol=0)
    error = ((got - full[:, 3:]).norm() / full[:, 3:].norm()).item()
    assert 1e-5 < error < limit


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
def test_a_quantised_step_is_the_same_in_either_shapes(policy, n_kv_head, bits):
    """Step by step from the same stored codes. Over whole texts the two need not agree: what a
    product's last bit puts on the other side of a rounding edge is a code further from then on."""
    model = make(policy, n_kv_head)
    idx = tokens(model, 2, 40)
    cache = build_cache(model.config, 2, 40, kv_bits=bits)
    model.prefill(idx[:, :4], cache)
    for i in range(4, 40):
        fixed = copy.deepcopy(cache)
        fixed.fixed_shapes = True
        want, got = (model.decode_one_token(idx[:, i : i + 1], each) for each in (cache, fixed))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_quantised_cache_rolls():
    model = make(position="rope", block_size=64)
    idx = tokens(model, 2, 60)
    want = windowed_forward(model, idx, 21)[:, 4:]
    for shapes in ("host", "fixed"):
        got = decode(model, idx, build_cache(model.config, 2, 21, kv_bits=8), 5, shapes)
        assert (got - want).norm() / want.norm() < 0.02


@torch.no_grad()
def test_quantisation_error_is_half_a_step():
    cache = build_cache(make().config, 1, 40, kv_bits=4)
    rows = cache.layers[0].keys
    x = torch.randn(1, 4, 9, 8) * 3 + 1
    codes, scale_zero = rows.quantize(x)
    assert codes.shape == (1, 4, 9, 4) and codes.dtype == torch.uint8
    step = cache.begin(40)  # of whose tokens these are the first: none of them is recent
    rows.write(step, x)
    back = rows.read(step, 0, 9)
    halves = x.unflatten(-1, (2, 4))
    unit = (halves.amax(-1) - halves.amin(-1)) / 15
    unit = unit[..., None].expand(-1, -1, -1, -1, 4).flatten(-2)
    assert ((back - x).abs() <= 0.51 * unit + 4e-3).all()


def test_bytes_per_token_are_the_formula():
    C, L, D, H = 32, 2, 8, 4
    assert build_cache(make().config, 3, 40).bytes_per_token == L * 2 * C * 4
    assert build_cache(make("grouped", 2).config, 3, 40).bytes_per_token == L * 2 * 2 * D * 4
    assert build_cache(make("recompute").config, 3, 40).bytes_per_token == L * C * 4
    half = build_cache(make().config, 3, 40, dtype=torch.bfloat16)
    assert half.bytes_per_token == L * 2 * C * 2
    for bits in (8, 4):  # codes, and two scales and two zeros of 2 bytes for each head's row
        cache = build_cache(make().config, 3, 40, kv_bits=bits)
        assert cache.bytes_per_token == L * 2 * H * (D * bits // 8 + 8)


@torch.no_grad()
def test_steps_allocate_no_new_buffers():
    model = make()
    cache = build_cache(model.config, 1, 40)
    before = [t.data_ptr() for layer in cache.layers for t in layer.tensors()]
    decode(model, tokens(model, 1, 40), cache, 3)
    assert before == [t.data_ptr() for layer in cache.layers for t in layer.tensors()]
    cache.reset()
    assert cache.length == 0
    model.prefill(tokens(model, 1, 40), cache)


@torch.no_grad()
def test_a_fixed_step_needs_no_host_value():
    """The same traced step serves every position: nothing in it read the host's count."""
    model = make(position="rope")
    idx = tokens(model, 1, 20)
    cache = build_cache(model.config, 1, 40)
    want = decode(model, idx, cache, 4)
    cache = build_cache(model.config, 1, 40)
    model.prefill(idx[:, :4], cache)
    cache.fixed_shapes = True
    for step in range(4, 20):
        cache.length = 4  # the host's count stands still, as in a replayed CUDA graph
        got = model.decode_one_token(idx[:, step : step + 1], cache)
        torch.testing.assert_close(got, want[:, step - 3], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.skipif(
    not cache_triton.AVAILABLE, reason="needs CUDA, or Triton and TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("bits,limit", [(None, 2e-3), (8, 4e-3), (4, 4e-2)])
@pytest.mark.parametrize("H,G,D", [(4, 4, 64), (6, 2, 32), (2, 1, 128)])
@pytest.mark.parametrize("slots,first,steps", [(300, 150, 2), (40, 36, 12), (40, 0, 19), (5, 4, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_kernel_agrees_with_plain_pytorch(H, G, D, bits, limit, slots, first, steps, turned):
    """A prefill, then tokens into two caches, rows of unequal length, rolling too."""
    device = "cpu" if cache_triton.INTERPRETED else "cuda"
    config = GPTConfig(n_layer=1, n_head=H, n_kv_head=G, n_embd=H * D, position="rope")
    caches = [build_cache(config, 2, slots, device, torch.float16, bits) for _ in range(2)]
    assert caches[0].kernel is not None
    caches[1].kernel = None
    generator = torch.Generator().manual_seed(0)

    def draw(t):
        return [
            torch.randn(2, n, t, D, generator=generator).to(device, torch.float16)
            for n in (H, G, G)
        ]

    if first:
        _, k, v = draw(first)
        for cache in caches:
            cache.layers[0].store(cache.begin(first), None, k, v)
            cache.advance(first)
            cache.set_lengths(torch.tensor([first, max(1, first - 3)]))
    for step in range(steps):
        q, k, v = draw(1)
        outs = []
        for cache in caches:
            cache.fixed_shapes = True
            now = cache.begin(1)
            layer, table = cache.layers[0], rope_table(D, now.positions.flatten())
            if turned and cache.kernel is not None:
                outs.append(cache.kernel(q, k, v, layer.keys, layer.values, cache, table))
            else:
                tables = [part.view(2, 1, 1, D // 2) for part in table]
                turned_k = apply_rope(k, *tables) if turned else k
                turned_q = apply_rope(q, *tables) if turned else q
                outs.append(layer.attend_new(now, None, None, turned_q, turned_k, v))
            cache.advance(1)
        assert (outs[0].float() - outs[1].float()).abs().max() < limit, step
    assert not caches[0].kernel.arrived.any()
    if bits is None and not turned:
        for a, b in zip(*(cache.layers[0].tensors() for cache in caches)):
            assert torch.equal(a, b)


def test_errors():
    model = make()
    with pytest.raises(UserError, match="kv_bits=3"):
        build_cache(model.config, 1, 8, kv_bits=3)
    with pytest.raises(UserError, match="block_size=40"):
        build_cache(model.config, 1, 41)
    with pytest.raises(UserError, match="rows and tokens"):
        build_cache(model.config, 1, 0)
    with pytest.raises(UserError, match="holds 8 tokens, 0 are taken and 9 more"):
        model.prefill(tokens(model, 1, 9), build_cache(model.config, 1, 8))
    cache = build_cache(model.config, 1, 4)
    model.prefill(tokens(model, 1, 4), cache)
    with pytest.raises(UserError, match="4 are taken"):
        model.decode_one_token(tokens(model, 1, 1), cache)
    assert cache.length == 4
    odd = make(n_embd=20, position="none")
    with pytest.raises(UserError, match="odd"):
        build_cache(odd.config, 1, 8, kv_bits=4)


@pytest.mark.parametrize(
    "other",
    [dict(n_embd=64), dict(n_head=2), dict(n_layer=3), dict(position="rope"), dict(n_kv_head=2)],
)
def test_a_cache_of_another_model_is_refused(other):
    model, cache = make(), build_cache(make(**other).config, 1, 8)
    for step in (
        lambda: model.prefill(tokens(model, 1, 4), cache),
        lambda: model.decode_one_token(tokens(model, 1, 1), cache),
    ):
        with pytest.raises(UserError, match="made for another model"):
            step()
    with pytest.raises(UserError, match="of 1 rows cannot take 3"):
        model.prefill(tokens(model, 3, 4), build_cache(model.config, 1, 8))
