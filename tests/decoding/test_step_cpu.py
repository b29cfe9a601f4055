"""The CPU's decoding step in C against plain PyTorch."""

import pytest
import torch
from int4_models import relative

from leangpt.decoding import step_cpu
from leangpt.decoding.generate import generate
from leangpt.int4.quantize import quantize_
from leangpt.kv_cache.cache import build_cache
from model import GPT, GPTConfig

needs_kernels = pytest.mark.skipif(step_cpu.library() is None, reason="needs cc, AVX-512 and VNNI")


def make(dtype=torch.float32, packed=False, **options):
    """A GPT whose attention is far from uniform, in a dtype, 4-bit or not."""
    torch.manual_seed(0)
    settings = dict(block_size=160, vocab_size=61, n_layer=2, n_head=4, n_embd=64, bias=True)
    model = GPT(GPTConfig(**(settings | options))).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    if packed:
        quantize_(model)
    return model.to(dtype)


@torch.no_grad()
def logits_of(model, idx, first, slots, native, lengths=None):
    """Logits (B, T - first, V) of steps after a prefill, by Step or by plain PyTorch."""
    cache = build_cache(model.config, len(idx), slots, dtype=model.transformer.wte.weight.dtype)
    model.prefill(idx[:, :first], cache, lengths)
    assert not native or step_cpu.supports(model, cache)
    step = step_cpu.Step(model, cache) if native else model.decode_one_token
    out = [step(idx[:, i : i + 1], cache).float() for i in range(first, idx.size(1))]
    assert cache.length == idx.size(1)
    return torch.stack(out, dim=1)


ARCHITECTURES = [
    dict(),
    dict(bias=False, n_embd=192, n_head=3),  # heads of 64
    dict(mlp="gelu_tanh", tie_embeddings=False, n_head=2),
    dict(norm="rmsnorm", mlp="swiglu", position="rope", n_kv_head=2, n_inner=96, bias=False),
    dict(attention_policy="grouped", n_kv_head=1, position="none", n_embd=48, n_head=3),
    dict(position="rope", mlp="swiglu", n_embd=256, n_head=1),  # the widest head
    dict(bias=False, qkv_bias=True, position="rope", norm="rmsnorm", n_kv_head=2),
    dict(qk_norm=True, position="rope", norm="rmsnorm", n_kv_head=2, n_head_dim=32),
    dict(qk_norm=True, position="none", n_head=2, n_head_dim=16),  # LayerNorm, narrower than x
]


@needs_kernels
@pytest.mark.parametrize("options", ARCHITECTURES)
def test_steps_are_the_models_own(options):
    model = make(**options)
    idx = torch.randint(61, (1, 150))
    want = logits_of(model, idx, 9, 160, native=False)
    got = logits_of(model, idx, 9, 160, native=True)
    assert relative(got, want) < 1e-5
    full = model(idx)[0][:, 9:].detach()
    assert relative(got, full) < 1e-5


@needs_kernels
@pytest.mark.parametrize("position", ["rope", "none"])
def test_steps_roll_past_the_caches_end(position):
    model = make(position=position, n_kv_head=2)
    idx = torch.randint(61, (1, 90))
    got, want = (logits_of(model, idx, 9, 30, native) for native in (True, False))
    assert relative(got, want) < 1e-5


@needs_kernels
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_rows_of_unequal_length(position):
    idx, lengths = torch.randint(61, (3, 40)), torch.tensor([4, 9, 1])
    slots = 30 if position == "rope" else 49
    for dtype, limit in ((torch.float32, 5e-4), (torch.bfloat16, 3e-2)):
        model = make(dtype, packed=True, position=position, n_kv_head=2)
        got, want = (logits_of(model, idx, 9, slots, native, lengths) for native in (True, False))
        assert relative(got, want) < limit


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", ARCHITECTURES)
def test_bfloat16_steps_are_nearer_to_float32_than_pytorchs(options, packed):
    if packed and options.get("n_embd") == 48:
        pytest.skip("groups of 32 do not divide 48")
    model, exact = make(torch.bfloat16, packed, **options), make(packed=packed, **options)
    exact.load_state_dict(model.state_dict())
    idx = torch.randint(61, (1, 40))
    want = logits_of(exact, idx, 9, 60, native=False)
    got, plain = (logits_of(model, idx, 9, 60, native) for native in (True, False))
    assert relative(got, want) < 1.1 * relative(plain, want) < 0.06


@needs_kernels
def test_large_scores_do_not_overflow():
    model = make()
    for block in model.transformer.h:
        block.attn.c_attn.weight.data.mul_(30)
    idx = torch.randint(61, (1, 100))
    got, want = (logits_of(model, idx, 9, 160, native) for native in (True, False))
    assert got.isfinite().all() and relative(got, want) < 1e-3


@needs_kernels
def test_generate_writes_the_same_text_with_and_without(monkeypatch):
    model, used = make(position="rope", block_size=40), []
    idx, call = torch.randint(61, (1, 5)), step_cpu.Step.__call__
    monkeypatch.setattr(step_cpu.Step, "__call__", lambda *a: used.append(1) or call(*a))
    text = generate(model, idx, 60, temperature=0)
    assert len(used) == 59
    monkeypatch.setattr(step_cpu, "supports", lambda *_: False)
    assert torch.equal(generate(model, idx, 60, temperature=0), text)
    assert len(used) == 59


@needs_kernels
def test_what_step_cannot_take_goes_the_plain_way():
    def supports(model, **options):
        dtype = model.transformer.wte.weight.dtype
        cache = build_cache(model.config, options.pop("rows", 1), 20, dtype=dtype, **options)
        return step_cpu.supports(model, cache)

    assert supports(make()) and supports(make(torch.bfloat16)) and not supports(make(), rows=2)
    assert supports(make(packed=True), rows=16) and not supports(make(packed=True), rows=17)
    assert not supports(make(), kv_bits=8)
    assert not supports(make(attention_policy="recompute"))
    assert not supports(make(torch.float64))
    assert not supports(make(n_head=8))  # heads of 8
    assert not supports(make().train())
    mixed = make(torch.bfloat16)
    mixed.transformer.ln_f.float()
    assert not supports(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert not supports(make())
    assert not supports(make(n_inner=72))
